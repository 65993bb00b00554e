#include "bridge/conversion.h"

#include <algorithm>

#include "bridge/formats/float_bytes.h"
#include "bridge/formats/fp8.h"
#include "bridge/formats/mxfp4.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kTaskElements = 1 << 20;  // values of a task that computes (4 MiB of float)
constexpr int64_t kTaskBytes = 8 << 20;     // of one that copies

/// Numbers that decide which experts a token goes to; Transformers keeps them in float.
bool keeps_dtype(const std::string& name) {
  return name.ends_with("e_score_correction_bias") || name.ends_with("expert_bias");
}

/// The matrices of a stack: rows of one, and how many.
int64_t matrix_rows(const LogicalTensor& tensor) {
  return tensor.shape.size() < 2 ? 1 : tensor.shape[tensor.shape.size() - 2];
}

void write_rows(ShardWriter& writer, const std::string& name, int64_t cols, int64_t first, int64_t count,
                const void* data, uint64_t element) {
  writer.write_box(name, cols, {first, 0, count, cols}, data, element);
}

uint64_t copy_bytes(const ConversionTask& task, ShardWriter& writer) {
  const auto& part = *task.conversion->from.parts[task.part];
  std::vector<std::byte> buffer(static_cast<size_t>(task.count));
  part.file->input().read(part.file->offset(*part.entry) + static_cast<uint64_t>(task.first), buffer.data(),
                          buffer.size());
  write_rows(writer, task.conversion->from.part_names[task.part], 1, task.first, task.count, buffer.data(), 1);
  return buffer.size();
}

[[noreturn]] void not_finite(const Conversion& conversion) {
  fail<NonFiniteError>("'", conversion.from.name, "' holds NaN or Inf and cannot be quantised as ",
                       quant_name(conversion.method));
}

/// Rows within one matrix, whole block rows of it.
uint64_t write_fp8(const ConversionTask& task, const std::vector<float>& values, ShardWriter& writer) {
  const auto& conversion = *task.conversion;
  const auto& from = conversion.from;
  const auto rows = matrix_rows(from), matrix = task.first / rows, row = task.first - matrix * rows;
  const auto columns = blocks_of(from.cols, conversion.block.cols);
  const auto block_rows = blocks_of(task.count, conversion.block.rows);
  std::vector<float> amax(static_cast<size_t>(block_rows * columns)), scales(amax.size());
  if (!raise_amax(values.data(), row, 0, task.count, from.cols, amax.data(), columns, conversion.block))
    not_finite(conversion);
  std::vector<uint8_t> quantised(values.size());
  auto factors = amax;
  for (auto& factor : factors) factor = fp8_factor(factor);
  quantize_fp8(values.data(), row, 0, task.count, from.cols, factors.data(), columns, conversion.block,
               quantised.data());
  std::transform(amax.begin(), amax.end(), scales.begin(), fp8_scale);
  write_rows(writer, from.name, from.cols, task.first, task.count, quantised.data(), 1);
  write_rows(writer, fp8_scale_name(from.name), columns,
             matrix * blocks_of(rows, conversion.block.rows) + row / conversion.block.rows, block_rows, scales.data(),
             4);
  return quantised.size() + scales.size() * 4;
}

/// One whole expert [inputs, outputs], turned round and packed.
uint64_t write_mxfp4(const ConversionTask& task, const std::vector<float>& values, ShardWriter& writer) {
  const auto& from = task.conversion->from;
  const auto inputs = task.count, outputs = from.cols, groups = inputs / kMxGroup, expert = task.first / inputs;
  std::vector<uint8_t> blocks(static_cast<size_t>(outputs * groups * kMxGroupBytes)),
      scales(static_cast<size_t>(outputs * groups));
  float group_values[kMxGroup];
  for (int64_t output = 0; output < outputs; ++output) {
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t i = 0; i < kMxGroup; ++i) group_values[i] = values[(group * kMxGroup + i) * outputs + output];
      const auto index = static_cast<size_t>(output * groups + group);
      if (!encode_mxfp4(group_values, blocks.data() + index * kMxGroupBytes, scales[index]))
        not_finite(*task.conversion);
    }
  }
  write_rows(writer, mxfp4_blocks_name(from.name), groups * kMxGroupBytes, expert * outputs, outputs, blocks.data(), 1);
  write_rows(writer, mxfp4_scales_name(from.name), groups, expert * outputs, outputs, scales.data(), 1);
  return blocks.size() + scales.size();
}

}  // namespace

std::vector<StoredTensor> Conversion::stored() const {
  if (copy) {
    std::vector<StoredTensor> result;
    for (size_t i = 0; i < from.parts.size(); ++i)
      result.push_back({from.part_names[i], from.parts[i]->entry->shape, from.parts[i]->entry->dtype});
    return result;
  }
  if (method == QuantMethod::kFp8) {
    auto grid = from.shape;
    grid[grid.size() - 2] = blocks_of(grid[grid.size() - 2], block.rows);
    grid.back() = blocks_of(grid.back(), block.cols);
    return {{from.name, from.shape, c10::ScalarType::Float8_e4m3fn},
            {fp8_scale_name(from.name), grid, c10::ScalarType::Float}};
  }
  if (method == QuantMethod::kMxfp4) {
    const auto groups = from.shape[1] / kMxGroup;
    return {
        {mxfp4_blocks_name(from.name), {from.shape[0], from.shape[2], groups, kMxGroupBytes}, c10::ScalarType::Byte},
        {mxfp4_scales_name(from.name), {from.shape[0], from.shape[2], groups}, c10::ScalarType::Byte}};
  }
  return {{from.name, from.shape, dtype}};
}

std::vector<Conversion> plan_conversions(std::vector<LogicalTensor> tensors, const ConvertOptions& options,
                                         const Quantization& found, const LoraMerge* merge,
                                         const std::set<std::string>& kept) {
  // A matrix whose scale is one for all of it is quantised again in blocks of the usual size.
  const bool blocks = found.method == QuantMethod::kFp8 && found.block.rows <= 1 << 20;
  std::vector<Conversion> result;
  for (auto& tensor : tensors) {
    Conversion conversion{.block = blocks ? found.block : BlockSize{}};
    // What a tensor is stored as decides what it becomes, also when an adapter brings other values.
    const auto method = tensor.method;
    const auto own = tensor.parts[0]->entry->dtype;
    const auto* brought =
        merge && merge->replaced().contains(tensor.name) ? &merge->replaced().at(tensor.name) : nullptr;
    if (merge && merge->touches(tensor.name)) conversion.merge = merge;
    if (brought) {
      const auto name = tensor.name;
      tensor = *brought;
      tensor.name = name;
    }
    conversion.from = std::move(tensor);
    const auto& from = conversion.from;
    if (from.source) {
      const bool quantised = method != QuantMethod::kNone;
      if (quantised && !options.dequantize) conversion.method = method;
      // A checkpoint that is quantised already says itself which weights are.
      const bool fresh = options.dequantize || found.method == QuantMethod::kNone;
      if (fresh && options.quantize != QuantMethod::kNone &&
          is_quantized_weight(options.quantize, from.name, from.shape)) {
        conversion.method = options.quantize;
        conversion.block = {};
      }
      const auto plain = quantised ? c10::ScalarType::BFloat16 : own;
      const bool wide = c10::elementSize(own) > 1 || quantised;  // a plain one-byte tensor is left alone
      conversion.dtype =
          options.dtype && wide && !keeps_dtype(from.name) && !kept.contains(from.name) ? *options.dtype : plain;
      const bool same = quantised ? conversion.method == method && !options.dequantize
                                  : conversion.method == QuantMethod::kNone && conversion.dtype == own;
      conversion.copy = same && !conversion.merge && !brought;
    } else {
      conversion.copy = true;
    }
    result.push_back(std::move(conversion));
  }
  return result;
}

void add_tasks(std::vector<ConversionTask>& tasks, const Conversion& conversion) {
  const auto& from = conversion.from;
  if (conversion.copy) {
    for (size_t part = 0; part < from.parts.size(); ++part) {
      const auto bytes = static_cast<int64_t>(from.parts[part]->entry->end - from.parts[part]->entry->begin);
      for (int64_t at = 0; at < bytes; at += kTaskBytes)
        tasks.push_back({&conversion, part, at, std::min(kTaskBytes, bytes - at)});
    }
    return;
  }
  if (from.rows * from.cols == 0) return;
  // Tasks begin at whole blocks of both sides and end with the matrix: scales are a matrix's own.
  const auto rows = matrix_rows(from);
  auto unit = conversion.method == QuantMethod::kFp8 ? std::min(conversion.block.rows, rows) : 1;
  if (conversion.method == QuantMethod::kMxfp4 || from.method == QuantMethod::kMxfp4) unit = rows;
  if (from.method == QuantMethod::kFp8) unit = std::max(unit, std::min(from.source->row_block(), rows));
  const bool by_matrix = unit > 1;
  const auto end = by_matrix ? rows : from.rows;
  const auto height = std::max<int64_t>(1, kTaskElements / from.cols / unit) * unit;
  for (int64_t matrix = 0; matrix < (by_matrix ? from.rows / rows : 1); ++matrix) {
    for (int64_t row = 0; row < end; row += height)
      tasks.push_back({&conversion, 0, matrix * rows + row, std::min(height, end - row)});
  }
}

uint64_t run_task(const ConversionTask& task, ShardWriter& writer) {
  const auto& conversion = *task.conversion;
  if (conversion.copy) return copy_bytes(task, writer);
  std::vector<float> values;
  conversion.from.read(task.first, task.count, values);
  if (conversion.merge) conversion.merge->add(conversion.from.name, task.first, task.count, values.data());
  if (conversion.method == QuantMethod::kFp8) return write_fp8(task, values, writer);
  if (conversion.method == QuantMethod::kMxfp4) return write_mxfp4(task, values, writer);
  const auto element = c10::elementSize(conversion.dtype);
  std::vector<std::byte> bytes(values.size() * element);
  from_float(conversion.dtype, values.data(), bytes.data(), static_cast<int64_t>(values.size()));
  write_rows(writer, conversion.from.name, conversion.from.cols, task.first, task.count, bytes.data(), element);
  return bytes.size();
}

}  // namespace mcore_bridge
