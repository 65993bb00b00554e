#include "parallel/random.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <array>
#include <map>
#include <mutex>

#include "core/philox.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr size_t kStreams = 2;

/// Of one device: the streams' states, and the default generator's seed they were started from.
struct Streams {
  std::array<at::Tensor, kStreams> states;
  uint64_t seed = 0;
};

// One table per process, as the default generators are. Forward and backward of one model take turns.
std::mutex mutex;
std::map<std::pair<c10::DeviceType, c10::DeviceIndex>, Streams> table;

Streams& streams_of(c10::Device device) { return table[{device.type(), device.is_cpu() ? -1 : device.index()}]; }

at::Generator default_generator(c10::Device device) {
  return device.is_cpu() ? at::detail::getDefaultCPUGenerator() : at::globalContext().defaultGenerator(device);
}

at::Tensor state_of(at::Generator& generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return generator.get_state();
}

void set_state(at::Generator& generator, const at::Tensor& state) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  generator.set_state(state);
}

std::vector<c10::Device> devices(c10::Device device) {
  std::vector<c10::Device> result{c10::Device(c10::kCPU)};
  if (!device.is_cpu() && !device.is_meta()) result.push_back(device);
  return result;
}

/// A seed far from every other place's.
uint64_t stream_seed(uint64_t seed, RandomStream stream, const RankCoordinates& place) {
  const auto tp = stream == RandomStream::kSplit ? static_cast<uint32_t>(place.tp) + 1 : 0;
  const auto block = philox({tp, static_cast<uint32_t>(place.cp), static_cast<uint32_t>(stream), 0x5EED}, seed);
  return (static_cast<uint64_t>(block[1]) << 32 | block[0]) >> 1;
}

}  // namespace

RandomScope::RandomScope(RandomStream stream, const ParallelState& parallel, c10::Device device) : device_(device) {
  const bool split = stream == RandomStream::kSplit;
  const auto& sizes = parallel.topology.sizes();
  if (device.is_meta() || (sizes.context == 1 && (!split || sizes.tensor == 1))) return;
  auto generator = default_generator(device);
  const std::lock_guard<std::mutex> lock(mutex);
  auto& streams = streams_of(device);
  const auto seed = generator.current_seed();
  if (streams.seed != seed) streams = {.states = {}, .seed = seed};
  stream_ = &streams.states[static_cast<size_t>(stream)];
  outside_ = state_of(generator);
  if (stream_->defined()) {
    set_state(generator, *stream_);
  } else {
    const std::lock_guard<std::mutex> generator_lock(generator.mutex());
    generator.set_current_seed(stream_seed(seed, stream, parallel.place));
  }
}

RandomScope::~RandomScope() {
  if (!stream_) return;
  auto generator = default_generator(device_);
  *stream_ = state_of(generator);
  set_state(generator, outside_);
}

void reset_random_streams() {
  const std::lock_guard<std::mutex> lock(mutex);
  table.clear();
}

std::vector<at::Tensor> random_state(c10::Device device) {
  std::vector<at::Tensor> states;
  for (const auto& each : devices(device)) {
    auto generator = default_generator(each);
    states.push_back(state_of(generator));
    const std::lock_guard<std::mutex> lock(mutex);
    const auto& streams = streams_of(each);
    const bool current = streams.seed == generator.current_seed();
    for (const auto& state : streams.states)
      states.push_back(current && state.defined() ? state : at::empty({0}, at::kByte));
  }
  return states;
}

void set_random_state(c10::Device device, const std::vector<at::Tensor>& states) {
  const auto all = devices(device);
  MCB_CHECK(states.size() == all.size() * (kStreams + 1), "set_random_state: expected ", all.size() * (kStreams + 1),
            " states, found ", states.size());
  size_t next = 0;
  for (const auto& each : all) {
    auto generator = default_generator(each);
    set_state(generator, states[next++]);
    const std::lock_guard<std::mutex> lock(mutex);
    auto& streams = streams_of(each);
    streams.seed = generator.current_seed();
    for (auto& state : streams.states) {
      const auto& given = states[next++];
      state = given.numel() > 0 ? given.clone() : at::Tensor();
    }
  }
}

}  // namespace mcore_bridge
