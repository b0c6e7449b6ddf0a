// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>

#include <cstdio>

namespace annulus {

void print_error(std::string_view message) noexcept {
  std::fprintf(stderr, "annulus: %.*s\n", static_cast<int>(message.size()), message.data());
  std::fflush(stderr);
}

namespace detail {

void fail_assertion(const char* condition, const std::string& message, std::source_location where) {
  throw AssertionFailure(fmt::format("internal error at {}:{}: {} ({})", where.file_name(), where.line(), message, condition));
}

}  // namespace detail

}  // namespace annulus
