// One thread's way from a source's bytes to a parameter.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <array>
#include <optional>

#include "bridge/tensor_source.h"

namespace mcore_bridge {

/// Reads straight into the parameter where dtype and layout allow it. Otherwise through a staging buffer of this
/// thread, converting on the way; for a parameter on a device two pinned buffers take turns, so that reading goes on
/// while the last block is copied, and dtypes are converted on the device. Not thread-safe: each thread has its own.
class BlockLoader {
 public:
  static constexpr int64_t kBlockBytes = 4 << 20;  ///< what a block should not exceed, by its source's dtype

  ~BlockLoader();
  /// Fills `target` (a view of the parameter whose elements in order are the box's) with a box of the source.
  void load(const TensorSource& source, const Box& box, at::Tensor target);
  /// Waits for the copies under way.
  void finish();

 private:
  struct Staging {
    at::Tensor bytes;
    std::optional<c10::Event> copied;
  };
  at::Tensor staging(Staging& slot, int64_t bytes, bool pinned);
  std::array<Staging, 2> slots_;
  size_t next_ = 0;
};

}  // namespace mcore_bridge
