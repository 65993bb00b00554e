// Offline conversion, comparison, and the quantised formats themselves (for tests and tools).
#include "bridge/convert.h"

#include <ATen/ATen.h>

#include "bindings/bindings.h"
#include "bridge/diff.h"
#include "bridge/folder_writer.h"
#include "bridge/logical_tensors.h"
#include "families/family.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

using Progress = std::function<void(uint64_t, uint64_t)>;

/// A Python callback for the thread that waits without the GIL; also lets Ctrl-C through. `callback` stays the
/// caller's.
Progress guarded(const std::optional<py::function>& callback) {
  return [&callback](uint64_t done, uint64_t total) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (callback) (*callback)(done, total);
  };
}

std::optional<c10::ScalarType> float_dtype(const std::string& name) {
  if (name.empty()) return std::nullopt;
  if (name == "float32") return c10::ScalarType::Float;
  if (name == "bfloat16") return c10::ScalarType::BFloat16;
  if (name == "float16") return c10::ScalarType::Half;
  fail("torch_dtype '", name, "': float32, bfloat16 or float16");
}

/// The tensors of a checkpoint by what they mean, for reading rows of them.
class LogicalCheckpoint {
 public:
  explicit LogicalCheckpoint(const std::string& path) : reader_(path, false) {
    for (auto& tensor : logical_tensors(reader_, quantization_of(path, reader_))) {
      names_.push_back(tensor.name);
      tensors_.emplace(tensor.name, std::move(tensor));
    }
  }
  const std::vector<std::string>& names() const { return names_; }
  const LogicalTensor& at(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) fail<KeyError>("the checkpoint has no tensor '", name, "'");
    return found->second;
  }
  /// Rows [first, first + count) of the first dimension; bit for bit when the dtype is the file's.
  at::Tensor read(const std::string& name, int64_t first, int64_t count, c10::ScalarType dtype) const {
    const auto& tensor = at(name);
    auto sizes = tensor.shape;
    MCB_CHECK(!sizes.empty() && first >= 0 && count >= 0 && first + count <= sizes[0], name, ": rows ", first, " to ",
              first + count, " of ", sizes.empty() ? 0 : sizes[0]);
    MCB_CHECK(tensor.source, name, " holds no floating point numbers");
    const auto inner = sizes[0] == 0 ? 0 : tensor.rows * tensor.cols / sizes[0];
    sizes[0] = count;
    auto result = at::empty(sizes, at::TensorOptions().dtype(dtype));
    const bool vector = sizes.size() == 1;
    const Box box = vector ? Box{0, first, 1, count}
                           : Box{first * inner / tensor.cols, 0, count * inner / tensor.cols, tensor.cols};
    if (box.numel() == 0) return result;
    if (tensor.source->dtype() == dtype) {
      tensor.source->read(box, result.mutable_data_ptr());
    } else {
      auto raw = at::empty({box.numel()}, at::TensorOptions().dtype(tensor.source->dtype()));
      tensor.source->read(box, raw.mutable_data_ptr());
      result.copy_(raw.view(sizes));
    }
    return result;
  }

 private:
  CheckpointReader reader_;
  std::vector<std::string> names_;
  std::map<std::string, LogicalTensor> tensors_;
};

}  // namespace

void init_convert(py::module_& module) {
  module.def(
      "convert_checkpoint",
      [](const std::string& model, const std::string& output_dir, const std::string& dtype, bool dequantize,
         const std::string& quantize, const std::string& adapter, int64_t max_shard_bytes,
         std::vector<std::pair<std::string, std::string>> extra_files, std::optional<py::function> progress) {
        ConvertReport report;
        {
          auto callback = guarded(progress);
          const py::gil_scoped_release no_gil;
          report = convert_checkpoint({.model = model,
                                       .output_dir = output_dir,
                                       .dtype = float_dtype(dtype),
                                       .dequantize = dequantize,
                                       .quantize = quant_method(quantize),
                                       .adapter = adapter,
                                       .max_shard_bytes = max_shard_bytes,
                                       .extra_files = std::move(extra_files),
                                       .progress = std::move(callback)});
        }
        return py::dict(py::arg("bytes_read") = report.bytes_read, py::arg("bytes_written") = report.bytes_written,
                        py::arg("tensors") = report.tensors, py::arg("copied") = report.copied,
                        py::arg("files") = report.files);
      },
      py::arg("model"), py::arg("output_dir"), py::kw_only(), py::arg("dtype"), py::arg("dequantize"),
      py::arg("quantize"), py::arg("adapter"), py::arg("max_shard_bytes"), py::arg("extra_files"), py::arg("progress"));

  module.def(
      "diff_checkpoints",
      [](const std::string& a, const std::string& b, bool dequantize, std::optional<py::function> progress) {
        auto callback = guarded(progress);
        const py::gil_scoped_release no_gil;
        return diff_checkpoints(a, b, {.dequantize = dequantize, .progress = std::move(callback)}).dump();
      },
      py::arg("a"), py::arg("b"), py::kw_only(), py::arg("dequantize"), py::arg("progress"));

  py::class_<LogicalCheckpoint>(module, "LogicalCheckpoint")
      .def(py::init<const std::string&>())
      .def("names", &LogicalCheckpoint::names)
      .def("shape", [](const LogicalCheckpoint& self, const std::string& name) { return self.at(name).shape; })
      .def("read", &LogicalCheckpoint::read, py::arg("name"), py::arg("first"), py::arg("count"), py::arg("dtype"),
           NoGil());

  py::class_<FolderWriter>(module, "FolderWriter")
      .def(py::init([](const std::string& folder,
                       const std::vector<std::tuple<std::string, std::vector<int64_t>, c10::ScalarType>>& tensors,
                       int64_t max_shard_bytes) {
             std::vector<StoredTensor> stored;
             for (const auto& [name, shape, dtype] : tensors) stored.push_back({name, shape, dtype});
             return std::make_unique<FolderWriter>(folder, stored, max_shard_bytes);
           }),
           py::arg("folder"), py::arg("tensors"), py::arg("max_shard_bytes"), NoGil())
      .def(
          "write",
          [](FolderWriter& self, const std::string& name, int64_t first_element, const at::Tensor& values) {
            const auto whole = values.contiguous();
            self.shards().write_box(name, 1, {first_element, 0, whole.numel(), 1}, whole.const_data_ptr(),
                                    whole.element_size());
          },
          py::arg("name"), py::arg("first_element"), py::arg("values"), NoGil())
      .def("abandon", &FolderWriter::abandon)
      .def("commit", &FolderWriter::commit, py::arg("extra_files"), NoGil());

  module.def(
      "parameter_plans",
      [](const ModelConfig& config, std::optional<std::pair<int64_t, int64_t>> layers, bool pre_process,
         bool post_process, int tp_rank, int tp_size) {
        const auto [first, count] = layers.value_or(std::pair{int64_t{0}, static_cast<int64_t>(config.num_layers)});
        const ChunkPlace place{.layers = {first, count}, .pre_process = pre_process, .post_process = post_process};
        py::list result;
        for (const auto& plan : make_plan(chunk_weights(config, place), tp_rank, tp_size)) {
          py::list tensors, regions;
          for (const auto& tensor : plan.tensors) tensors.append(py::make_tuple(tensor.name, tensor.sizes()));
          for (const auto& region : plan.regions) {
            const auto strides = hf_strides(plan.tensors[region.tensor], region);
            regions.append(py::dict(py::arg("tensor") = region.tensor, py::arg("rows") = region.rows,
                                    py::arg("cols") = region.cols, py::arg("row") = region.row,
                                    py::arg("col") = region.col, py::arg("stretches") = region.stretches,
                                    py::arg("stretch") = region.stretch,
                                    py::arg("strides") = std::tuple{strides.offset, strides.row, strides.col}));
          }
          result.append(py::dict(py::arg("name") = plan.name, py::arg("sizes") = plan.sizes,
                                 py::arg("pad_rows") = plan.rule.pad_rows, py::arg("float32") = plan.rule.float32,
                                 py::arg("tensors") = tensors, py::arg("regions") = regions));
        }
        return result;
      },
      py::arg("config"), py::kw_only(), py::arg("layers") = std::nullopt, py::arg("pre_process") = true,
      py::arg("post_process") = true, py::arg("tp_rank") = 0, py::arg("tp_size") = 1,
      "For every parameter of a rank's chunk (the whole model on one rank unless told): its Hugging Face tensors "
      "(name, shape) and the regions it is "
      "made of; `layers`: (first, count); strides: (offset, row, column) of a region in its tensor's elements");
}

}  // namespace mcore_bridge
