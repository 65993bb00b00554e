#include "parallel/together.h"

#include <ATen/ATen.h>

#include <cstring>
#include <random>

#include "mcore_bridge/error.h"

namespace mcore_bridge {
namespace {

enum Kind : int64_t { kValue = 1, kKey, kFile, kIo, kNonFinite, kOther };

struct Failure {
  int64_t kind = 0;
  std::string text;
};

Failure attempt(const std::function<void()>& work) {
  try {
    work();
    return {};
  } catch (const KeyError& error) {
    return {kKey, error.what()};
  } catch (const FileNotFoundError& error) {
    return {kFile, error.what()};
  } catch (const IoError& error) {
    return {kIo, error.what()};
  } catch (const NonFiniteError& error) {
    return {kNonFinite, error.what()};
  } catch (const ValueError& error) {
    return {kValue, error.what()};
  } catch (const c10::Error& error) {
    return {kOther, error.what_without_backtrace()};
  } catch (const std::exception& error) {
    return {kOther, error.what()};
  }
}

[[noreturn]] void raise(const Failure& failure) {
  switch (failure.kind) {
    case kValue:
      throw ValueError(failure.text);
    case kKey:
      throw KeyError(failure.text);
    case kFile:
      throw FileNotFoundError(failure.text);
    case kIo:
      throw IoError(failure.text);
    case kNonFinite:
      throw NonFiniteError(failure.text);
    default:
      throw Error(failure.text);
  }
}

}  // namespace

void together(const Group& group, const std::function<void()>& work) {
  if (group.size() == 1) return work();  // the original exception
  auto failure = attempt(work);
  // The first failing rank has the largest number of ranks behind it.
  auto first = at::full({1}, failure.kind ? group.size() - group.rank() : 0, at::kLong);
  group.all_reduce_max(first);
  const auto behind = first.item<int64_t>();
  if (behind == 0) return;
  const int root = group.size() - static_cast<int>(behind);
  if (root != group.rank()) failure = {};
  auto head = at::tensor({failure.kind, static_cast<int64_t>(failure.text.size())}, at::kLong);
  group.broadcast(head, root);
  failure.kind = head[0].item<int64_t>();
  failure.text.resize(static_cast<size_t>(head[1].item<int64_t>()));
  auto bytes = at::empty({static_cast<int64_t>(failure.text.size()) + 1}, at::kByte);
  std::memcpy(bytes.mutable_data_ptr(), failure.text.c_str(), failure.text.size() + 1);
  group.broadcast(bytes, root);
  std::memcpy(failure.text.data(), bytes.const_data_ptr(), failure.text.size());
  if (root != group.rank()) failure.text = "rank " + std::to_string(group.ranks()[root]) + ": " + failure.text;
  raise(failure);
}

int64_t common_token(const Group& group) {
  std::random_device random;
  const auto own = static_cast<int64_t>((static_cast<uint64_t>(random()) << 32 | random()) >> 1) | 1;
  auto largest = at::full({1}, own, at::kLong);
  group.all_reduce_max(largest);
  return largest.item<int64_t>();
}

}  // namespace mcore_bridge
