// Where the elements of a Hugging Face tensor come from. Loading knows nothing else about a checkpoint's format.
#pragma once

#include <c10/core/ScalarType.h>

#include <compare>
#include <memory>
#include <string>
#include <vector>

#include "bridge/checkpoint_reader.h"
#include "bridge/formats/quantization.h"
#include "models/fp8_scales.h"
#include "plan/plan.h"

namespace mcore_bridge {

/// A box of a stored tensor, seen as a matrix whose columns are the last dimension (plan.h: stored_box), in elements.
struct Box {
  int64_t row = 0, col = 0, rows = 0, cols = 0;
  int64_t numel() const { return rows * cols; }
};

class TensorSource {
 public:
  virtual ~TensorSource() = default;
  /// Of the values read() gives; the loader converts them to the parameter's.
  virtual c10::ScalarType dtype() const = 0;
  /// Writes the box's values to `to`, row after row without gaps. Called from several threads at once, each time with a
  /// few MiB at most (but at least one row), so an implementation may hold a box of its own.
  virtual void read(const Box& box, void* to) const = 0;
  /// Bytes of the files that read(box) reads.
  virtual uint64_t file_bytes(const Box& box) const = 0;

  /// Where a box begins in the files: boxes are read in this order.
  struct Position {
    std::string file;
    uint64_t offset = 0;
    auto operator<=>(const Position&) const = default;
  };
  virtual Position position(const Box& box) const = 0;
  /// Boxes read together should begin at multiples of this many rows (the height of a quantisation block).
  virtual int64_t row_block() const { return 1; }
  /// The scales of a matrix in blocks of 128 x 128, filled in by the reads; null for other formats.
  virtual const Fp8Scales* scales() const { return nullptr; }
  /// The FP8 codes behind the values, for parameters that keep codes themselves: its reads fill in scales() as well.
  /// Null where scales() is.
  virtual const TensorSource* codes() const { return nullptr; }
  /// Announces, before the first read, a box that will be read exactly once. A source that has to hold something can
  /// free it after the last.
  virtual void expect(const Box& box) const {}
};

/// What a checkpoint has for a tensor of the model.
struct OpenedTensor {
  std::shared_ptr<const TensorSource> source;  ///< null when the tensor is missing or does not fit
  std::string wrong;                           ///< why it does not fit: "is [3], the model needs [4]"; empty otherwise
  std::vector<std::string> used;               ///< names in the checkpoint that belong to it
};

/// Looks `tensor` up in every format this version reads: see the table in tensor_source.cpp. `quantization`: the
/// checkpoint's (quantization_of). The reader must outlive the source.
OpenedTensor open_tensor(const CheckpointReader& reader, const HfTensor& tensor, const Quantization& quantization);

/// A tensor that lies in a file as it is, seen as a matrix of `cols` columns.
std::shared_ptr<const TensorSource> plain_source(const CheckpointReader::Tensor& tensor, int64_t cols);

}  // namespace mcore_bridge
