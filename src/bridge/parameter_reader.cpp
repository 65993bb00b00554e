#include "bridge/parameter_reader.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "bridge/region_blocks.h"
#include "core/thread_pool.h"
#include "parallel/together.h"

namespace mcore_bridge {
namespace {

constexpr int64_t kStagedBytes = 256 << 20;  // of values that wait for being quantised, beside one parameter's
constexpr int64_t kBlock = 128;

int64_t value_bytes(const PlannedParameter& parameter, int64_t elements) {
  return elements * static_cast<int64_t>(c10::elementSize(parameter.dtype));
}

}  // namespace

ParameterReader::ParameterReader(const Sources& sources, const std::vector<PlannedParameter>& parameters,
                                 const Progress& progress)
    : sources_(sources),
      parameters_(parameters),
      progress_(progress),
      loaders_(static_cast<size_t>(std::max(1, io_threads()))) {
  for (const auto& parameter : parameters_) {
    for (const auto& region : parameter.plan.regions) {
      if (sources_.contains(parameter.plan.tensors[region.tensor].name))
        work_ += value_bytes(parameter, region.rows * region.cols);
    }
  }
}

void ParameterReader::run(const Group& tp, LoadReport& report) {
  const bool any = std::any_of(parameters_.begin(), parameters_.end(), [](const auto& each) { return each.in_fp8; });
  for (size_t next = 0; next < parameters_.size();) {
    const auto first = next;
    int64_t staged = 0;
    for (; next < parameters_.size() && staged < kStagedBytes; ++next) {
      if (parameters_[next].in_fp8) staged += value_bytes(parameters_[next], parameters_[next].tensor.numel());
    }
    std::vector<InFp8> in_fp8;
    auto round = [&] { in_fp8 = read(first, next, report); };
    if (any) {  // scales are agreed on behind every round: who cannot read must not leave the others waiting there
      together(tp, round);
    } else {
      round();
    }
    for (const auto& each : in_fp8) settle(each);
  }
}

std::vector<ParameterReader::InFp8> ParameterReader::read(size_t first, size_t last, LoadReport& report) {
  std::vector<InFp8> in_fp8;
  std::vector<Block> blocks;
  for (auto i = first; i < last; ++i) {
    const auto& parameter = parameters_[i];
    auto target = parameter.tensor.detach();
    if (parameter.in_fp8) {
      target = target_of(parameter);
      if (!target.defined()) continue;
      const bool codes = target.scalar_type() == parameter.tensor.scalar_type();
      in_fp8.push_back({&parameter, codes ? at::Tensor() : target});
    }
    add_blocks(blocks, parameter, target, report);
  }
  std::sort(blocks.begin(), blocks.end(), [](const auto& a, const auto& b) { return a.position < b.position; });
  auto load_block = [&](size_t index, int thread) {
    const at::NoGradGuard no_grad;
    const auto& block = blocks[index];
    loaders_[static_cast<size_t>(thread)].load(*block.source, block.box, block.target);
    done_ += block.work;
  };
  run_parallel(blocks.size(), static_cast<int>(loaders_.size()), load_block, [&] {
    if (progress_) progress_(done_, work_);
  });
  for (auto& loader : loaders_) loader.finish();
  return in_fp8;
}

bool ParameterReader::takes_codes(const PlannedParameter& parameter) const {
  if (parameter.in_fp8->fp8()->options().recipe != Fp8Recipe::kBlockwise) return false;
  int64_t covered = 0;
  for (const auto& region : parameter.plan.regions) {
    const auto& tensor = parameter.plan.tensors[region.tensor];
    const auto found = sources_.find(tensor.name);
    if (found == sources_.end() || !found->second->codes() || tensor.transposed || region.stretches != 1) return false;
    const auto box = stored_box(tensor, region);
    for (const auto edge : {region.row, region.col, region.rows, region.cols, box.row, box.col})
      if (edge % kBlock != 0) return false;
    covered += region.rows * region.cols;
  }
  return covered == parameter.tensor.numel();
}

at::Tensor ParameterReader::target_of(const PlannedParameter& parameter) const {
  if (takes_codes(parameter)) return parameter.tensor.detach();
  int64_t covered = 0;
  for (const auto& region : parameter.plan.regions) {
    if (sources_.contains(parameter.plan.tensors[region.tensor].name)) covered += region.rows * region.cols;
  }
  if (covered == 0) return {};
  if (covered < parameter.tensor.numel()) return parameter.value();
  return at::empty(parameter.tensor.sizes(), parameter.tensor.options().dtype(parameter.dtype).requires_grad(false));
}

void ParameterReader::add_blocks(std::vector<Block>& blocks, const PlannedParameter& parameter,
                                 const at::Tensor& target, LoadReport& report) const {
  const bool codes = parameter.in_fp8 && target.scalar_type() == parameter.tensor.scalar_type();
  int64_t covered = 0;
  for (const auto& region : parameter.plan.regions) {
    const auto& tensor = parameter.plan.tensors[region.tensor];
    const auto found = sources_.find(tensor.name);
    if (found == sources_.end()) continue;
    const auto& source = codes ? *found->second->codes() : *found->second;
    const auto elements = BlockLoader::kBlockBytes / static_cast<int64_t>(c10::elementSize(source.dtype()));
    for (auto& [box, view] : region_blocks(tensor, region, target, elements, source.row_block())) {
      source.expect(box);
      report.bytes_needed += static_cast<int64_t>(source.file_bytes(box));
      blocks.push_back({&source, box, view, source.position(box), value_bytes(parameter, box.numel())});
    }
    covered += region.rows * region.cols;
  }
  if (parameter.plan.rule.pad_rows && covered > 0 && covered < target.numel()) at::Tensor(target).zero_();
}

void ParameterReader::settle(const InFp8& read) const {
  const auto& [parameter, values] = read;
  if (values.defined()) return parameter->in_fp8->set_weight_values(values);
  const auto& scale = parameter->in_fp8->fp8()->stored_scale();
  for (const auto& region : parameter->plan.regions) {
    const auto& tensor = parameter->plan.tensors[region.tensor];
    const auto box = stored_box(tensor, region);
    const auto rows = region.rows / kBlock, cols = region.cols / kBlock;
    if (rows * cols == 0) continue;
    const auto& grid = sources_.at(tensor.name)->scales()->grid;
    scale.narrow(0, region.row / kBlock, rows)
        .narrow(1, region.col / kBlock, cols)
        .copy_(grid.narrow(0, box.row / kBlock, rows).narrow(1, box.col / kBlock, cols));
  }
  parameter->in_fp8->wide().set_exact(parameter->tensor);
}

}  // namespace mcore_bridge
