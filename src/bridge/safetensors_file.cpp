#include "bridge/safetensors_file.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

using c10::ScalarType;

struct DTypeRow {
  const char* name;
  ScalarType dtype;
  uint64_t bytes;
};
constexpr DTypeRow kDTypes[] = {
    {"F32", ScalarType::Float, 4},
    {"BF16", ScalarType::BFloat16, 2},
    {"F16", ScalarType::Half, 2},
    {"F64", ScalarType::Double, 8},
    {"I64", ScalarType::Long, 8},
    {"I32", ScalarType::Int, 4},
    {"I16", ScalarType::Short, 2},
    {"I8", ScalarType::Char, 1},
    {"U8", ScalarType::Byte, 1},
    {"U16", ScalarType::UInt16, 2},
    {"U32", ScalarType::UInt32, 4},
    {"U64", ScalarType::UInt64, 8},
    {"BOOL", ScalarType::Bool, 1},
    {"F8_E4M3", ScalarType::Float8_e4m3fn, 1},
    {"F8_E5M2", ScalarType::Float8_e5m2, 1},
    {"F8_E8M0", ScalarType::Float8_e8m0fnu, 1},
};
constexpr uint64_t kLongestHeader = 100'000'000;  // as the reference implementation

/// JSON whose objects must not repeat a key (two tensors of one name would silently become one).
nlohmann::json parse_strict(const std::string& text, const std::string& path) {
  std::vector<std::set<std::string>> keys;
  std::string repeated;
  auto callback = [&](int, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(parsed.get<std::string>()).second)
      repeated = parsed.get<std::string>();
    return true;
  };
  nlohmann::json header;
  try {
    header = nlohmann::json::parse(text, callback);
  } catch (const nlohmann::json::exception& error) {
    fail(path, ": the header is not JSON: ", error.what());
  }
  MCB_CHECK(repeated.empty(), path, ": the header names '", repeated, "' twice");
  return header;
}

SafetensorsEntry parse_entry(const std::string& name, const nlohmann::json& value, uint64_t data_bytes,
                             const std::string& path) {
  auto bad = [&](const auto&... what) { fail(path, ": tensor '", name, "': ", what...); };
  if (!value.is_object()) bad("its description is no object");
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!value.contains(key)) bad(key, " is missing");
  }
  SafetensorsEntry entry;
  if (!value["dtype"].is_string()) bad("dtype is no string");
  entry.dtype_name = value["dtype"].get<std::string>();
  const auto row =
      std::find_if(std::begin(kDTypes), std::end(kDTypes), [&](const auto& r) { return entry.dtype_name == r.name; });
  if (row == std::end(kDTypes)) bad("dtype '", entry.dtype_name, "' is unknown");
  entry.dtype = row->dtype;
  if (!value["shape"].is_array()) bad("shape is no list");
  uint64_t bytes = row->bytes;
  for (const auto& size : value["shape"]) {
    if (!size.is_number_unsigned()) bad("shape ", value["shape"].dump(), " holds something that is no size");
    const auto extent = size.get<uint64_t>();
    if (extent > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) ||
        (extent != 0 && bytes > std::numeric_limits<uint64_t>::max() / extent)) {
      bad("shape ", value["shape"].dump(), " overflows");
    }
    bytes *= extent;
    entry.shape.push_back(static_cast<int64_t>(extent));
  }
  const auto& offsets = value["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    bad("data_offsets ", offsets.dump(), " is no pair of positions");
  }
  entry.begin = offsets[0].get<uint64_t>();
  entry.end = offsets[1].get<uint64_t>();
  if (entry.begin > entry.end) bad("data_offsets ", offsets.dump(), " run backwards");
  if (entry.end > data_bytes)
    bad("its data ends at byte ", entry.end, ", the file holds ", data_bytes, " (truncated?)");
  if (entry.end - entry.begin != bytes) {
    bad("its data has ", entry.end - entry.begin, " bytes, shape ", value["shape"].dump(), " of ", entry.dtype_name,
        " needs ", bytes);
  }
  return entry;
}

}  // namespace

const char* safetensors_dtype(c10::ScalarType dtype) {
  for (const auto& row : kDTypes) {
    if (row.dtype == dtype) return row.name;
  }
  fail("safetensors has no name for dtype ", c10::toString(dtype));
}

std::map<std::string, SafetensorsEntry> parse_safetensors_header(const std::string& text, uint64_t data_bytes,
                                                                 const std::string& path) {
  const auto header = parse_strict(text, path);
  MCB_CHECK(header.is_object(), path, ": the header is no JSON object");
  std::map<std::string, SafetensorsEntry> entries;
  std::vector<std::pair<uint64_t, uint64_t>> spans;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      MCB_CHECK(value.is_object(), path, ": __metadata__ is no object");
      for (const auto& item : value)
        MCB_CHECK(item.is_string(), path, ": __metadata__ holds something other than strings");
      continue;
    }
    auto entry = parse_entry(name, value, data_bytes, path);
    spans.emplace_back(entry.begin, entry.end);
    entries.emplace(name, std::move(entry));
  }
  std::sort(spans.begin(), spans.end());
  uint64_t at = 0;
  for (const auto& [begin, end] : spans) {
    MCB_CHECK(begin >= at, path, ": two tensors overlap at byte ", begin);
    MCB_CHECK(begin == at, path, ": bytes ", at, " to ", begin, " belong to no tensor");
    at = end;
  }
  MCB_CHECK(at == data_bytes, path, ": ", data_bytes - at, " bytes after the last tensor belong to none");
  return entries;
}

SafetensorsFile::SafetensorsFile(const std::string& path) : input_(path) {
  const auto size = input_.size();
  MCB_CHECK(size >= 8, path, ": ", size, " bytes are too short for a safetensors file");
  uint64_t length = 0;
  input_.read(0, &length, 8);
  MCB_CHECK(length <= kLongestHeader, path, ": a header of ", length,
            " bytes is too long for a safetensors file (limit ", kLongestHeader, ")");
  MCB_CHECK(length <= size - 8, path, ": the header has ", length, " bytes, the file ends after ", size - 8,
            " (truncated?)");
  std::string header(length, '\0');
  input_.read(8, header.data(), length);
  data_ = 8 + length;
  entries_ = parse_safetensors_header(header, size - data_, path);
}

}  // namespace mcore_bridge
