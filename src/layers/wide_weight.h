// What is known of a weight beyond its FP8 codes: the values they were made from, in host memory until the optimizer's
// masters begin with them, and later who has those masters.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

namespace mcore_bridge {

/// Who trains weights that are stored as codes.
class WeightMasters {
 public:
  virtual ~WeightMasters() = default;
  /// The whole weight from its master, in the layer's dtype. Collective over the ranks that hold the same weight.
  virtual at::Tensor values(const at::Tensor& codes) const = 0;
};

class WideWeight {
 public:
  /// The codes were just made from `values`, which are copied to the host.
  void keep(const at::Tensor& values, const at::Tensor& codes);
  /// The codes as they are now say all there is to know.
  void set_exact(const at::Tensor& codes);
  void forget();

  /// Whether keep() or set_exact() was the last that happened to the codes.
  bool known(const at::Tensor& codes) const;
  /// A copy for the codes' device; undefined when the codes are all there is.
  at::Tensor values(const at::Tensor& codes) const;
  bool in_memory() const { return values_.defined(); }

  void set_masters(std::weak_ptr<const WeightMasters> masters) { masters_ = std::move(masters); }
  std::shared_ptr<const WeightMasters> masters() const { return masters_.lock(); }

 private:
  at::Tensor values_;                ///< on the host
  std::optional<uint32_t> version_;  ///< of the codes that are known
  std::weak_ptr<const WeightMasters> masters_;
};

}  // namespace mcore_bridge
