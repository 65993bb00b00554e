#include "mcore_bridge/training_checkpoint.h"

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "bindings/bindings.h"
#include "parallel/group.h"
#include "train/optimizer_state.h"

namespace mcore_bridge {
namespace {

/// A group as Python names it: (process group, its global ranks, this process's place), or None for one rank.
using GroupParts = std::optional<std::tuple<c10::intrusive_ptr<c10d::ProcessGroup>, std::vector<int>, int>>;

Group group_of(const GroupParts& parts) {
  return parts ? Group(std::get<0>(*parts), std::get<1>(*parts), std::get<2>(*parts)) : Group();
}

CheckpointOptions checkpoint_options(bool peft_format, const std::string& adapter_name, int64_t max_shard_bytes,
                                     bool optimizer) {
  return {.peft_format = peft_format,
          .adapter_name = adapter_name,
          .max_shard_bytes = max_shard_bytes,
          .optimizer = optimizer};
}

}  // namespace

void init_training_checkpoint(py::module_& module) {
  py::class_<CheckpointWriter>(module, "CheckpointWriter")
      .def(py::init([](Trainer& trainer, bool peft_format, const std::string& adapter_name, int64_t max_shard_bytes,
                       bool optimizer) {
             return std::make_unique<CheckpointWriter>(
                 trainer, checkpoint_options(peft_format, adapter_name, max_shard_bytes, optimizer));
           }),
           py::arg("trainer"), py::kw_only(), py::arg("peft_format"), py::arg("adapter_name"),
           py::arg("max_shard_bytes"), py::arg("optimizer"), py::keep_alive<1, 2>(), NoGil())
      .def("snapshot", &CheckpointWriter::snapshot, NoGil())
      .def(
          "write",
          [](CheckpointWriter& writer, const std::string& folder,
             std::vector<std::pair<std::string, std::string>> files, std::string state, const GroupParts& group) {
            const auto report = writer.write(folder, {std::move(files), std::move(state)}, group_of(group));
            return std::pair{report.bytes, report.seconds};
          },
          py::arg("folder"), py::arg("files"), py::arg("state"), py::arg("group"), NoGil());

  module.def(
      "load_optimizer_state",
      [](Trainer& trainer, const std::string& folder, bool peft_format, const std::string& adapter_name) {
        load_optimizer_state(trainer, folder, checkpoint_options(peft_format, adapter_name, 1, true));
      },
      py::arg("trainer"), py::arg("folder"), py::kw_only(), py::arg("peft_format"), py::arg("adapter_name"), NoGil());

  module.def(
      "damaged_files",
      [](const std::string& folder, const std::vector<std::tuple<std::string, int64_t, int64_t>>& files,
         const GroupParts& group) {
        std::vector<FileRecord> records;
        for (const auto& [name, bytes, crc] : files) records.push_back({name, bytes, crc});
        return damaged_files(folder, records, group_of(group));
      },
      py::arg("folder"), py::arg("files"), py::arg("group"), NoGil());

  module.def("optimizer_scalars", [](Trainer& trainer) {
    auto values = trainer.optimizer().scalars();
    values["steps"] = trainer.optimizer().steps();
    return values.dump();
  });
  module.def("set_optimizer_scalars", [](Trainer& trainer, const std::string& text) {
    auto values = Json::parse(text);
    trainer.optimizer().set_steps(values.at("steps").get<int64_t>());
    values.erase("steps");
    trainer.optimizer().set_scalars(values);
  });
}

}  // namespace mcore_bridge
