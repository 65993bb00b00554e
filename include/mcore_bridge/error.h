// Errors a user can cause. Python sees ValueError, KeyError, FileNotFoundError, OSError, FloatingPointError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace mcore_bridge {

/// Base of every error thrown on purpose. The text names what was asked, what was found and what to do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A value or a combination of values that cannot work.
class ValueError : public Error {
 public:
  using Error::Error;
};

/// A name that should exist and does not (a weight, a config key).
class KeyError : public Error {
 public:
  using Error::Error;
};

class FileNotFoundError : public Error {
 public:
  using Error::Error;
};

/// The operating system refused: full disk, no permission, short read.
class IoError : public Error {
 public:
  using Error::Error;
};

/// NaN or Inf where a finite number must be.
class NonFiniteError : public Error {
 public:
  using Error::Error;
};

template <class E = ValueError, class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw E(text.str());
}

}  // namespace mcore_bridge

/// Throws ValueError with the concatenated arguments unless `condition` holds.
#define MCB_CHECK(condition, ...)                        \
  do {                                                   \
    if (!(condition)) ::mcore_bridge::fail(__VA_ARGS__); \
  } while (false)
