// A set of safetensors files that all ranks write together, with the checksum of every file.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <string>
#include <vector>

#include "bridge/shard_layout.h"
#include "bridge/tensor_source.h"

namespace mcore_bridge {

class TensorFiles {
 public:
  /// Files <stem>*.safetensors in `subfolder` of a checkpoint ("" for the checkpoint itself).
  TensorFiles(std::string subfolder, std::string stem, const std::vector<StoredTensor>& tensors,
              int64_t max_shard_bytes);

  /// A box of a stored tensor (seen as a matrix of `cols` columns) that this rank writes, a few MiB at most. `values`:
  /// its elements in order, any shape, strides, device and dtype; written as the stored dtype.
  void add(const std::string& tensor, int64_t cols, const Box& box, const at::Tensor& values);
  bool empty() const { return layout_.files.empty(); }

  /// Bytes of this rank's boxes.
  int64_t bytes() const;
  /// Copies this rank's boxes into `memory` (bytes() bytes on the host, pinned when the values are on a device) without
  /// waiting for the device. Until release() write() takes them from there.
  void copy_to(const at::Tensor& memory);
  void release() { copies_.clear(); }

  /// Makes the files. One process does this.
  void create(const std::filesystem::path& folder) const;
  /// Writes this rank's boxes and waits until they are on the disk. Returns, by file, this rank's part of its CRC-32C.
  std::vector<uint32_t> write(const std::filesystem::path& folder) const;

  struct File {
    std::string name;  ///< with the subfolder
    uint64_t bytes;
    uint32_t header_part;  ///< of the CRC: what create() wrote
  };
  std::vector<File> files() const;
  /// (name with the subfolder, content); empty with one file.
  std::pair<std::string, std::string> index() const;

 private:
  struct Piece {
    std::string tensor;
    int64_t cols;
    Box box;
    at::Tensor values;
    c10::ScalarType dtype;
    int64_t bytes() const { return box.numel() * static_cast<int64_t>(c10::elementSize(dtype)); }
  };
  std::string subfolder_, stem_;
  ShardLayout layout_;
  std::map<std::string, c10::ScalarType> dtypes_;
  std::vector<Piece> pieces_;
  std::vector<at::Tensor> copies_;  ///< by piece, on the host
};

}  // namespace mcore_bridge
