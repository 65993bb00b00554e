#include "bridge/folder_writer.h"

#include "mcore_bridge/error.h"

namespace mcore_bridge {

FolderWriter::FolderWriter(const std::string& folder, const std::vector<StoredTensor>& tensors, int64_t max_shard_bytes)
    : layout_(shard_layout(tensors, max_shard_bytes, "model")), target_(folder) {
  target_.begin();
  try {
    writer_ = std::make_unique<ShardWriter>(target_.staging(), layout_);
    writer_->create();
  } catch (...) {
    target_.abandon();
    throw;
  }
}

FolderWriter::~FolderWriter() {
  if (!committed_) target_.abandon();
}

void FolderWriter::commit(const std::vector<std::pair<std::string, std::string>>& extra_files) {
  writer_->sync();
  for (const auto& [name, content] : extra_files) {
    MCB_CHECK(!name.empty() && name.find('/') == std::string::npos && name[0] != '.', "extra file '", name,
              "' is no plain file name");
    write_file(target_.staging() / name, content);
  }
  if (!layout_.index.empty()) write_file(target_.staging() / "model.safetensors.index.json", layout_.index);
  target_.commit([](const std::string& name) {
    return name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") || name.ends_with(".bin") ||
           name.ends_with(".bin.index.json");
  });
  committed_ = true;
}

}  // namespace mcore_bridge
