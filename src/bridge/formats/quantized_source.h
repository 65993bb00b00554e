// Quantised weights as sources of plain values.
#pragma once

#include <memory>

#include "bridge/tensor_source.h"

namespace mcore_bridge {

/// `weight`: float8_e4m3fn [..., rows, cols]; `scale`: numbers per block, [..., block rows, block columns], or one in
/// all. Values are float. ValueError when the shapes do not go together.
std::shared_ptr<const TensorSource> fp8_source(const std::string& name, const CheckpointReader::Tensor& weight,
                                               const CheckpointReader::Tensor& scale, BlockSize block);

/// Values of the transposed weight [experts, 32 * groups, rows] as bfloat16, which holds them exactly. ValueError when
/// the shapes do not go together.
std::shared_ptr<const TensorSource> mxfp4_source(const std::string& name, const CheckpointReader::Tensor& blocks,
                                                 const CheckpointReader::Tensor& scales);
/// Shape of that weight.
std::vector<int64_t> mxfp4_shape(const SafetensorsEntry& blocks);

/// As entries of the table in tensor_source.cpp.
OpenedTensor open_fp8(const CheckpointReader& reader, const HfTensor& tensor, const Quantization& quantization);
OpenedTensor open_mxfp4(const CheckpointReader& reader, const HfTensor& tensor, const Quantization& quantization);

}  // namespace mcore_bridge
