// One field's value between JSON and C++, with errors that name the field.
#pragma once

#include "mcore_bridge/model_config.h"

namespace mcore_bridge {

// clang-format off
void read_field(const char* name, const Json& value, bool& field);
void read_field(const char* name, const Json& value, int64_t& field);
void read_field(const char* name, const Json& value, double& field);
void read_field(const char* name, const Json& value, std::string& field);
void read_field(const char* name, const Json& value, OptInt& field);
void read_field(const char* name, const Json& value, OptDouble& field);
void read_field(const char* name, const Json& value, OptString& field);
void read_field(const char* name, const Json& value, IntList& field);
void read_field(const char* name, const Json& value, DoubleList& field);
void read_field(const char* name, const Json& value, StringList& field);
void read_field(const char* name, const Json& value, Pattern& field);
void read_field(const char* name, const Json& value, StageLayout& field);
void read_field(const char* name, const Json& value, Json& field);
void read_field(const char* name, const Json& value, DType& field);

Json write_field(bool field);
Json write_field(int64_t field);
Json write_field(double field);
Json write_field(const std::string& field);
Json write_field(const OptInt& field);
Json write_field(const OptDouble& field);
Json write_field(const OptString& field);
Json write_field(const IntList& field);
Json write_field(const DoubleList& field);
Json write_field(const StringList& field);
Json write_field(const Pattern& field);
Json write_field(const StageLayout& field);
Json write_field(const Json& field);
Json write_field(DType field);

inline const char* field_type(const bool&) { return "bool"; }
inline const char* field_type(const int64_t&) { return "int"; }
inline const char* field_type(const double&) { return "float"; }
inline const char* field_type(const std::string&) { return "str"; }
inline const char* field_type(const OptInt&) { return "int?"; }
inline const char* field_type(const OptDouble&) { return "float?"; }
inline const char* field_type(const OptString&) { return "str?"; }
inline const char* field_type(const IntList&) { return "list[int]"; }
inline const char* field_type(const DoubleList&) { return "list[float]"; }
inline const char* field_type(const StringList&) { return "list[str]"; }
inline const char* field_type(const Pattern&) { return "pattern"; }
inline const char* field_type(const StageLayout&) { return "layout"; }
inline const char* field_type(const Json&) { return "dict?"; }
inline const char* field_type(const DType&) { return "dtype"; }
// clang-format on

}  // namespace mcore_bridge
