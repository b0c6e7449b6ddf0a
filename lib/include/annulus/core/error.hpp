// SPDX-License-Identifier: Apache-2.0
// Who made the mistake decides the mechanism: the caller -> InvalidArgument (exit 2), this binary lacks a part -> NotCompiled (exit 2),
// a library or the machine -> RuntimeFailure (exit 3), our own broken state -> AssertionFailure (exit 3).
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <limits>
#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace annulus {

/// Process exit codes. `stopped`: asked to stop, with work left that a later job can go on with.
enum class ExitCode : int { passed = 0, check_failed = 1, bad_input = 2, runtime_failure = 3, stopped = 4 };

/// Base of every exception this project throws; what() is one sentence for the user.
class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode code() const noexcept { return code_; }

 private:
  ExitCode code_;
};

/// The caller's or user's mistake: names what was found and what is allowed.
class InvalidArgument : public Error {
 public:
  explicit InvalidArgument(const std::string& message) : Error(ExitCode::bad_input, message) {}
};

/// A backend, transport or kernel this binary was built without.
class NotCompiled : public Error {
 public:
  explicit NotCompiled(const std::string& message) : Error(ExitCode::bad_input, message) {}
};

/// A library, the operating system or a peer failed.
class RuntimeFailure : public Error {
 public:
  explicit RuntimeFailure(const std::string& message) : Error(ExitCode::runtime_failure, message) {}
};

/// An internal invariant is broken.
class AssertionFailure : public Error {
 public:
  explicit AssertionFailure(const std::string& message) : Error(ExitCode::runtime_failure, message) {}
};

/// One line to standard error, prefixed by the program's name. Where that cannot be written, nothing can be said: it is no error.
void print_error(std::string_view message) noexcept;

namespace detail {
[[noreturn]] void fail_assertion(const char* condition, const std::string& message, std::source_location where);
}  // namespace detail

}  // namespace annulus

/// The caller must have kept `condition`; otherwise throws InvalidArgument with the formatted message.
#define ANNULUS_EXPECTS(condition, ...)                                                 \
  do {                                                                                  \
    if (!(condition)) { throw ::annulus::InvalidArgument(::fmt::format(__VA_ARGS__)); } \
  } while (false)

/// An internal invariant, checked in every build; throws AssertionFailure with the place.
#define ANNULUS_ASSERT(condition, ...)                                                                                                \
  do {                                                                                                                                \
    if (!(condition)) { ::annulus::detail::fail_assertion(#condition, ::fmt::format(__VA_ARGS__), std::source_location::current()); } \
  } while (false)

namespace annulus {

/// `value` as To, or AssertionFailure if it does not fit. The only way to narrow for BLAS, MPI or CUDA.
template <class To, class From>
To checked_narrow(From value, std::source_location where = std::source_location::current()) {
  static_assert(std::is_integral_v<To> && std::is_integral_v<From>);
  if (!std::in_range<To>(value)) {
    detail::fail_assertion("value fits the narrower type", fmt::format("{} does not fit {} bytes", value, sizeof(To)), where);
  }
  return static_cast<To>(value);
}

}  // namespace annulus
