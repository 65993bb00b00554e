#include "bridge/header_parser.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "core/strict_json.h"
#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

using c10::ScalarType;

struct DTypeRow {
  const char* name;
  ScalarType dtype;
  uint64_t bits;
};
constexpr DTypeRow kDTypes[] = {
    {"F32", ScalarType::Float, 32},
    {"BF16", ScalarType::BFloat16, 16},
    {"F16", ScalarType::Half, 16},
    {"F64", ScalarType::Double, 64},
    {"I64", ScalarType::Long, 64},
    {"I32", ScalarType::Int, 32},
    {"I16", ScalarType::Short, 16},
    {"I8", ScalarType::Char, 8},
    {"U8", ScalarType::Byte, 8},
    {"U16", ScalarType::UInt16, 16},
    {"U32", ScalarType::UInt32, 32},
    {"U64", ScalarType::UInt64, 64},
    {"BOOL", ScalarType::Bool, 8},
    {"C64", ScalarType::ComplexFloat, 64},
    {"F8_E4M3", ScalarType::Float8_e4m3fn, 8},
    {"F8_E5M2", ScalarType::Float8_e5m2, 8},
    {"F8_E8M0", ScalarType::Float8_e8m0fnu, 8},
    {"F8_E4M3FNUZ", ScalarType::Float8_e4m3fnuz, 8},
    {"F8_E5M2FNUZ", ScalarType::Float8_e5m2fnuz, 8},
    {"F4", ScalarType::Undefined, 4},
    {"F6_E2M3", ScalarType::Undefined, 6},
    {"F6_E3M2", ScalarType::Undefined, 6},
};

constexpr size_t kMostDimensions = 64;  // as many as torch takes

/// {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"key": "text"}}; members of an
/// entry that are none of the three are passed over, as the reference implementation does.
class HeaderParser : public StrictJson {
 public:
  HeaderParser(uint64_t data_bytes) : data_bytes_(data_bytes) {}
  std::map<std::string, SafetensorsEntry> entries;
  std::vector<std::pair<uint64_t, uint64_t>> spans;

 private:
  static constexpr const char* kMetadata = "__metadata__";

  template <class... What>
  [[noreturn]] void bad(const What&... what) const {
    fail(path(), ": tensor '", printable(key(0)), "': ", what...);
  }
  bool in_metadata() const { return depth() > 0 && key(0) == kMetadata; }
  bool in_list(const char* name) const { return depth() == 3 && key(1) == name; }

  void open(bool object) override {
    if (depth() == 0) {
      MCB_CHECK(object, path(), ": the header is no JSON object");
    } else if (in_metadata()) {
      MCB_CHECK(depth() == 1 && object, path(), ": __metadata__ is no object of strings");
    } else if (depth() == 1) {
      if (!object) bad("its description is no object");
      entry_ = {};
      offsets_.clear();
      seen_dtype_ = seen_shape_ = seen_offsets_ = false;
    } else if (depth() == 2) {
      if (key(1) == "dtype") bad("dtype is no string");
      if (key(1) == "shape" && object) bad("shape is no list");
      if (key(1) == "data_offsets" && object) bad("data_offsets is no pair of positions");
      seen_shape_ = seen_shape_ || key(1) == "shape";
      seen_offsets_ = seen_offsets_ || key(1) == "data_offsets";
    } else if (in_list("shape")) {
      bad("shape holds something that is no size");
    } else if (in_list("data_offsets")) {
      bad("data_offsets is no pair of positions");
    }
  }

  void close(bool object) override {
    if (depth() == 1 && !in_metadata()) finish();
  }

  void scalar(const nlohmann::json& value) override {
    MCB_CHECK(depth() > 0, path(), ": the header is no JSON object");
    if (in_metadata()) {
      MCB_CHECK(depth() == 2 && value.is_string(), path(), ": __metadata__ is no object of strings");
    } else if (depth() == 1) {
      bad("its description is no object");
    } else if (depth() == 2 && key(1) == "dtype") {
      if (!value.is_string()) bad("dtype is no string");
      entry_.dtype_name = value.get<std::string>();
      seen_dtype_ = true;
    } else if (depth() == 2 && key(1) == "shape") {
      bad("shape is no list");
    } else if (depth() == 2 && key(1) == "data_offsets") {
      bad("data_offsets is no pair of positions");
    } else if (in_list("shape")) {
      if (!value.is_number_unsigned()) bad("shape holds something that is no size: ", printable(value.dump()));
      const auto extent = value.get<uint64_t>();
      if (extent > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) bad("shape overflows");
      if (entry_.shape.size() == kMostDimensions) bad("shape has more than ", kMostDimensions, " dimensions");
      entry_.shape.push_back(static_cast<int64_t>(extent));
    } else if (in_list("data_offsets")) {
      if (!value.is_number_unsigned() || offsets_.size() == 2) bad("data_offsets is no pair of positions");
      offsets_.push_back(value.get<uint64_t>());
    }
  }

  std::string shape_text() const {
    std::string text;
    for (const auto size : entry_.shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return "[" + text + "]";
  }

  void finish() {
    if (!seen_dtype_) bad("dtype is missing");
    if (!seen_shape_) bad("shape is missing");
    if (!seen_offsets_) bad("data_offsets is missing");
    const auto row = std::find_if(std::begin(kDTypes), std::end(kDTypes),
                                  [&](const auto& known) { return entry_.dtype_name == known.name; });
    if (row == std::end(kDTypes)) bad("dtype '", printable(entry_.dtype_name), "' is unknown");
    entry_.dtype = row->dtype;
    uint64_t bits = row->bits;
    for (const auto size : entry_.shape) {
      const auto extent = static_cast<uint64_t>(size);
      if (extent != 0 && bits > std::numeric_limits<uint64_t>::max() / extent)
        bad("shape ", shape_text(), " overflows");
      bits *= extent;
    }
    if (bits % 8 != 0) bad("shape ", shape_text(), " of ", entry_.dtype_name, " is no whole number of bytes");
    if (offsets_.size() != 2) bad("data_offsets is no pair of positions");
    entry_.begin = offsets_[0];
    entry_.end = offsets_[1];
    if (entry_.begin > entry_.end) bad("data_offsets ", entry_.begin, ", ", entry_.end, " run backwards");
    if (entry_.end > data_bytes_)
      bad("its data ends at byte ", entry_.end, ", the file holds ", data_bytes_, " (truncated?)");
    if (entry_.end - entry_.begin != bits / 8) {
      bad("its data has ", entry_.end - entry_.begin, " bytes, shape ", shape_text(), " of ", entry_.dtype_name,
          " needs ", bits / 8);
    }
    spans.emplace_back(entry_.begin, entry_.end);
    entries.emplace(key(0), std::move(entry_));
  }

  const uint64_t data_bytes_;
  SafetensorsEntry entry_;
  std::vector<uint64_t> offsets_;
  bool seen_dtype_ = false, seen_shape_ = false, seen_offsets_ = false;
};

/// {"metadata": {anything}, "weight_map": {"name": "file"}}
class IndexParser : public StrictJson {
 public:
  std::map<std::string, std::string> files;
  bool found = false;

 private:
  bool in_map() const { return depth() == 2 && key(0) == "weight_map"; }
  void open(bool object) override {
    MCB_CHECK(depth() > 0 || object, path(), ": the index is no JSON object");
    MCB_CHECK(!in_map(), path(), ": the shard of '", in_map() ? printable(key(1)) : "", "' is no file name");
    if (depth() == 1 && key(0) == "weight_map") {
      MCB_CHECK(object, path(), ": weight_map is no object");
      found = true;
    }
  }
  void close(bool) override {}
  void scalar(const nlohmann::json& value) override {
    MCB_CHECK(depth() > 0, path(), ": the index is no JSON object");
    MCB_CHECK(depth() != 1 || key(0) != "weight_map", path(), ": weight_map is no object");
    if (!in_map()) return;
    MCB_CHECK(value.is_string(), path(), ": the shard of '", printable(key(1)), "' is no file name");
    const auto file = value.get<std::string>();
    const bool plain = !file.empty() && file.find('/') == std::string::npos && file.find('\0') == std::string::npos &&
                       file != "." && file != "..";
    MCB_CHECK(plain, path(), ": the shard '", printable(file), "' of '", printable(key(1)),
              "' lies outside the folder");
    files.emplace(key(1), file);
  }
};

}  // namespace

const char* safetensors_dtype(c10::ScalarType dtype) {
  for (const auto& row : kDTypes) {
    if (row.dtype == dtype && dtype != ScalarType::Undefined) return row.name;
  }
  fail("safetensors has no name for dtype ", c10::toString(dtype));
}

std::map<std::string, SafetensorsEntry> parse_safetensors_header(const std::string& header, uint64_t data_bytes,
                                                                 const std::string& path) {
  HeaderParser parser(data_bytes);
  parser.parse(header, path, "the header");
  std::sort(parser.spans.begin(), parser.spans.end());
  uint64_t at = 0;
  for (const auto& [begin, end] : parser.spans) {
    MCB_CHECK(begin >= at, path, ": two tensors overlap at byte ", begin);
    MCB_CHECK(begin == at, path, ": bytes ", at, " to ", begin, " belong to no tensor");
    at = end;
  }
  MCB_CHECK(at == data_bytes, path, ": ", data_bytes - at, " bytes after the last tensor belong to none");
  return std::move(parser.entries);
}

std::map<std::string, std::string> parse_index(const std::string& text, const std::string& path) {
  IndexParser parser;
  parser.parse(text, path, "the index");
  MCB_CHECK(parser.found, path, ": weight_map is missing");
  return std::move(parser.files);
}

}  // namespace mcore_bridge
