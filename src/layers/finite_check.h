// Looks for the first NaN or Inf of a forward pass, when somebody asks for it.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace mcore_bridge {

/// While one lives, check_finite() on this thread notes the first place whose output is not finite.
class FiniteCheck {
 public:
  FiniteCheck();
  ~FiniteCheck();
  FiniteCheck(const FiniteCheck&) = delete;
  FiniteCheck& operator=(const FiniteCheck&) = delete;
  const std::string& first() const { return first_; }  ///< empty: everything was finite

 private:
  friend void check_finite(const at::Tensor& output, const char* prefix, int64_t number);
  std::string first_;
};

/// Called with the output of "<prefix><number>" (of "<prefix>" with a negative number). Does nothing, and costs a
/// comparison, unless a FiniteCheck lives.
void check_finite(const at::Tensor& output, const char* prefix, int64_t number = -1);

}  // namespace mcore_bridge
