// Activations that wait for backward in host memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

namespace mcore_bridge {

class OffloadedBlock;

/// Moves what one block of layers keeps for backward to host memory, and back when backward comes near. On a GPU the
/// copies run on a stream of their own: out while the next layers compute, back while the layer behind is
/// differentiated.
class ActivationOffload {
 public:
  /// Layers name here what their backward keeps (not parameters). Nothing happens unless a block collects on this
  /// thread. Who names a tensor must not use it again before backward.
  static void keep(const at::Tensor& tensor);

  /// Collects what is kept while alive.
  class Block {
   public:
    Block();
    ~Block();
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    /// Sends off what was collected; it returns before the gradient of `y`, the block's output, is used. `before`: the
    /// block in front of this one (or null), whose tensors start their way back at the same time.
    std::shared_ptr<OffloadedBlock> leave(const at::Tensor& y, std::shared_ptr<OffloadedBlock> before);

   private:
    std::vector<at::Tensor> kept_;
    Block* outer_;
    friend class ActivationOffload;
  };
};

}  // namespace mcore_bridge
