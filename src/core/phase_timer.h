// Where a step's time goes. Costs no synchronisation: on a device events are recorded and read once they have happened.
#pragma once

#include <c10/core/Device.h>

#include <map>
#include <string>

namespace mcore_bridge {

enum class Phase { kForward, kBackward, kCommunication, kOptimizer };

/// The time of the scope counts for `phase`, less that of scopes inside it. On the thread that trains.
class TimedPhase {
 public:
  TimedPhase(Phase phase, c10::Device device);
  ~TimedPhase();
  TimedPhase(const TimedPhase&) = delete;
  TimedPhase& operator=(const TimedPhase&) = delete;

 private:
  c10::Device device_;
};

/// Seconds by phase ("forward", "backward", "communication": pipeline messages and gradient reduction, "optimizer")
/// since the last call, as far as the device has got.
std::map<std::string, double> take_phase_seconds();

}  // namespace mcore_bridge
