#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <set>

#include "bridge/atomic_folder.h"
#include "bridge/tensor_encoder.h"
#include "bridge/tensor_files.h"
#include "core/crc32c.h"
#include "mcore_bridge/error.h"
#include "mcore_bridge/training_checkpoint.h"
#include "models/gpt_model.h"
#include "parallel/together.h"
#include "train/state_plan.h"

namespace mcore_bridge {
namespace {

namespace fs = std::filesystem;
constexpr const char* kStateFolder = "training_state";
constexpr int64_t kBlockBytes = 4 << 20;  // what one thread writes at a time

Box box_of(const HfTensor& tensor, const Region& region) {
  const auto box = stored_box(tensor, region);
  return {box.row, box.col, box.rows, box.cols};
}

std::vector<StoredTensor> stored_as(const std::vector<HfTensor>& tensors, const std::vector<c10::ScalarType>& dtypes) {
  std::vector<StoredTensor> result;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (dtypes[i] != c10::ScalarType::Undefined) result.push_back({tensors[i].name, tensors[i].sizes(), dtypes[i]});
  }
  return result;
}

/// Several sets of numbers, one per kind of state and element of a list, combined over the ranks by maximum.
class AgreedTable {
 public:
  explicit AgreedTable(size_t columns)
      : columns_(columns), values_(at::zeros({static_cast<int64_t>(kStateKinds.size() * columns)}, at::kLong)) {}
  int64_t& at(size_t kind, size_t column) { return values_.mutable_data_ptr<int64_t>()[kind * columns_ + column]; }
  void agree(const Group& group) {
    if (values_.numel() > 0) group.all_reduce_max(values_);
  }

 private:
  size_t columns_;
  at::Tensor values_;
};

size_t kind_index(const std::string& kind) {
  for (size_t i = 0; i < kStateKinds.size(); ++i) {
    if (kind == kStateKinds[i]) return i;
  }
  fail("checkpoint: optimizer state of the unknown kind '", kind, "'");
}

}  // namespace

struct CheckpointWriter::State {
  Trainer& trainer;
  CheckpointOptions options;
  std::vector<PlannedParameter> parameters;
  std::vector<TensorFiles> sets;
  at::Tensor memory;  ///< host copies, bytes
  c10::Device device = c10::kCPU;

  State(Trainer& trainer_, const CheckpointOptions& options_) : trainer(trainer_), options(options_) {}

  const ParallelState& parallel() const { return trainer.chunks().at(0)->parallel(); }

  void plan() {
    const auto& chunks = trainer.chunks();
    const Selection selection{.peft_format = options.peft_format, .adapter_name = options.adapter_name};
    std::vector<HfTensor> whole;
    std::vector<PlannedSlice> slices, masters;
    together(parallel().world, [&] {
      device = chunks.at(0)->device();
      parameters = planned_parameters(chunks, selection);
      whole = whole_checkpoint(chunks, selection);
      auto state = trainer.optimizer().state();
      if (options.optimizer) slices = plan_slices(chunks, parameters, state);
      std::erase_if(state, [](const StateSlice& slice) { return !slice.of_codes || slice.kind != "master"; });
      if (options.weights) masters = plan_slices(chunks, parameters, std::move(state));
    });
    if (options.weights) plan_weights(whole, masters);
    if (options.optimizer) plan_state(whole, slices);
  }

  /// `masters`: of the weights that train as FP8 codes, whose values they are.
  void plan_weights(const std::vector<HfTensor>& whole, const std::vector<PlannedSlice>& masters) {
    const auto dtype = trainer.chunks().at(0)->config().params_dtype;
    std::vector<c10::ScalarType> dtypes;
    for (const auto& tensor : whole) dtypes.push_back(plain_dtype(tensor, dtype));
    auto& set = sets.emplace_back("", options.peft_format ? "adapter_model" : "model", stored_as(whole, dtypes),
                                  options.max_shard_bytes);
    add_slices(masters, [&](const PlannedSlice&) -> TensorFiles& { return set; });
    // Replicas hold the same: they take turns.
    int turn = 0;
    for (const auto& parameter : parameters) {
      if (parameter.in_fp8 && trainer.optimizer().trains(parameter.tensor))
        continue;  // added just now, here or elsewhere
      const auto& replicas = replicas_of(parameter.plan, parallel());
      const auto flat = (parameter.in_fp8 ? parameter.value() : parameter.tensor.detach()).view({-1});
      for (const auto& region : parameter.plan.regions) {
        if (!region.owner) continue;
        const auto& tensor = parameter.plan.tensors[region.tensor];
        for (const auto& block : stored_blocks(tensor, region, flat.element_size(), kBlockBytes)) {
          if (turn++ % replicas.size() == replicas.rank())
            set.add(tensor.name, stored_columns(tensor), box_of(tensor, block),
                    stored_view(flat, 0, parameter.plan, block));
        }
      }
    }
  }

  void plan_state(const std::vector<HfTensor>& whole, const std::vector<PlannedSlice>& slices) {
    std::map<std::string, size_t> places;
    for (size_t i = 0; i < whole.size(); ++i) places[whole[i].name] = i;
    AgreedTable dtypes(whole.size());
    for (const auto& planned : slices) {
      const auto kind = kind_index(planned.slice.kind);
      for (const auto& tensor : planned.parameter->plan.tensors)
        dtypes.at(kind, places.at(tensor.name)) = 1 + static_cast<int64_t>(planned.slice.values.scalar_type());
    }
    dtypes.agree(parallel().world);
    std::array<int, kStateKinds.size()> at{};
    for (size_t kind = 0; kind < kStateKinds.size(); ++kind) {
      std::vector<c10::ScalarType> columns;
      bool any = false;
      for (size_t i = 0; i < whole.size(); ++i) {
        const auto value = dtypes.at(kind, i);
        columns.push_back(value ? static_cast<c10::ScalarType>(value - 1) : c10::ScalarType::Undefined);
        any = any || value;
      }
      at[kind] = any ? static_cast<int>(sets.size()) : -1;
      if (any) sets.emplace_back(kStateFolder, kStateKinds[kind], stored_as(whole, columns), options.max_shard_bytes);
    }
    add_slices(slices, [&](const PlannedSlice& planned) -> TensorFiles& {
      return sets.at(static_cast<size_t>(at[kind_index(planned.slice.kind)]));
    });
  }

  /// What this rank writes of the slices, into the set that `set_of` names. Collective.
  template <class SetOf>
  void add_slices(const std::vector<PlannedSlice>& slices, SetOf set_of) {
    const auto replicated = held_by_all(slices);
    int turn = 0;
    for (size_t i = 0; i < slices.size(); ++i) {
      const auto& planned = slices[i];
      const auto& replicas = replicas_of(planned.parameter->plan, parallel());
      if (replicated[i] && turn++ % replicas.size() != replicas.rank()) continue;
      auto& set = set_of(planned);
      for (const auto& region : planned.regions) {
        if (!region.owner) continue;
        const auto& tensor = planned.tensor(region);
        set.add(tensor.name, stored_columns(tensor), box_of(tensor, region),
                stored_view(planned.slice.values, planned.slice.begin, planned.parameter->plan, region));
      }
    }
  }

  /// By slice: whether every data-parallel rank holds it (no distributed optimizer), told by how many elements of the
  /// parameter's state there are in all.
  std::vector<bool> held_by_all(const std::vector<PlannedSlice>& slices) {
    std::vector<bool> result(slices.size(), false);
    std::map<const PlannedParameter*, size_t> rows;
    for (const auto& parameter : parameters) rows.emplace(&parameter, rows.size());
    // Experts have replicas of their own: a row of numbers for each of the two kinds of groups.
    const auto count_of_rows = static_cast<int64_t>(rows.size());
    auto held = at::zeros({2, static_cast<int64_t>(kStateKinds.size()), count_of_rows}, at::kLong);
    auto place = [&](const PlannedSlice& planned) -> int64_t& {
      const size_t expert = planned.parameter->plan.rule.experts.total > 0 ? 1 : 0;
      return held
          .mutable_data_ptr<int64_t>()[(expert * kStateKinds.size() + kind_index(planned.slice.kind)) * rows.size() +
                                       rows.at(planned.parameter)];
    };
    for (const auto& planned : slices) place(planned) += planned.slice.end - planned.slice.begin;
    for (int expert = 0; expert < 2; ++expert) {
      const auto& replicas = parallel().replicas(expert);
      auto part = held[expert];
      if (replicas.size() > 1 && part.numel() > 0) replicas.all_reduce(part);
    }
    for (size_t i = 0; i < slices.size(); ++i) {
      const auto& replicas = replicas_of(slices[i].parameter->plan, parallel());
      const auto whole = slices[i].parameter->tensor.numel();
      const auto count = place(slices[i]);
      TORCH_INTERNAL_ASSERT(count == whole || count == whole * replicas.size(), slices[i].slice.parameter, ": ", count,
                            " elements of ", slices[i].slice.kind, " for a parameter of ", whole);
      result[i] = replicas.size() > 1 && count == whole * replicas.size();
    }
    return result;
  }

  /// XOR over the ranks of every file's CRC part.
  std::vector<std::vector<uint32_t>> combined(const std::vector<std::vector<uint32_t>>& own, const Group& group) const {
    std::vector<int64_t> flat;
    for (const auto& set : own) flat.insert(flat.end(), set.begin(), set.end());
    auto result = own;
    if (flat.empty() || group.size() == 1) return result;
    const auto all = group.all_gather(at::tensor(flat, at::kLong)).view({group.size(), -1});
    const auto* values = all.const_data_ptr<int64_t>();
    size_t at = 0;
    for (auto& set : result) {
      for (auto& part : set) {
        part = 0;
        for (int rank = 0; rank < group.size(); ++rank)
          part ^= static_cast<uint32_t>(values[static_cast<size_t>(rank) * flat.size() + at]);
        ++at;
      }
    }
    return result;
  }
};

CheckpointWriter::CheckpointWriter(Trainer& trainer, const CheckpointOptions& options)
    : state_(std::make_unique<State>(trainer, options)) {
  state_->plan();
}

CheckpointWriter::~CheckpointWriter() = default;

void CheckpointWriter::snapshot() {
  auto& s = *state_;
  int64_t total = 0;
  for (const auto& set : s.sets) total += set.bytes();
  const bool on_device = !s.device.is_cpu();
  if (!s.memory.defined()) s.memory = at::empty({total}, at::TensorOptions().dtype(at::kByte).pinned_memory(on_device));
  int64_t at = 0;
  for (auto& set : s.sets) {
    const auto bytes = set.bytes();
    set.copy_to(s.memory.narrow(0, at, bytes));
    at += bytes;
  }
  if (on_device) {
    const c10::impl::VirtualGuardImpl guard(s.device.type());
    guard.synchronizeStream(guard.getStream(s.device));
  }
}

CheckpointReport CheckpointWriter::write(const std::string& folder, const Content& content, const Group& group) {
  const auto start = std::chrono::steady_clock::now();
  auto& s = *state_;
  const bool leader = group.rank() == 0;
  std::unique_ptr<AtomicFolder> target;
  CheckpointReport report;
  try {
    const auto token = common_token(group);
    together(group, [&] {
      target = std::make_unique<AtomicFolder>(folder, token);
      if (!leader) return;
      target->begin();
      fs::create_directory(target->staging() / kStateFolder);
      for (const auto& set : s.sets) set.create(target->staging());
    });
    std::vector<std::vector<uint32_t>> parts;
    together(group, [&] {
      for (const auto& set : s.sets) parts.push_back(set.write(target->staging()));
    });
    parts = s.combined(parts, group);
    together(group, [&] {
      if (!leader) return;
      auto state = Json::parse(content.state);
      auto& files = state["files"] = Json::object();
      auto extra = content.files;
      for (size_t i = 0; i < s.sets.size(); ++i) {
        const auto names = s.sets[i].files();
        for (size_t j = 0; j < names.size(); ++j) {
          Crc32cPart crc(names[j].bytes);
          crc.combine(parts[i][j] ^ names[j].header_part);
          files[names[j].name] = {{"bytes", names[j].bytes}, {"crc32c", crc.value()}};
          report.bytes += static_cast<int64_t>(names[j].bytes);
        }
        if (auto index = s.sets[i].index(); !index.second.empty()) extra.push_back(std::move(index));
      }
      for (const auto& [name, text] : extra) {
        write_file(target->staging() / name, text);
        files[name] = {{"bytes", text.size()}, {"crc32c", crc32c(text.data(), text.size())}};
        report.bytes += static_cast<int64_t>(text.size());
      }
      write_file(target->staging() / kStateFolder / "state.json", state.dump(1) + "\n");
      sync_path(target->staging() / kStateFolder);
      target->commit([](const std::string&) { return true; });
    });
  } catch (...) {
    for (auto& set : s.sets) set.release();
    if (leader && target) target->abandon();
    throw;
  }
  for (auto& set : s.sets) set.release();
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace mcore_bridge
