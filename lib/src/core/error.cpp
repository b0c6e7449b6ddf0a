// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/error.hpp>

namespace annulus::detail {

void fail_assertion(const char* condition, const std::string& message, std::source_location where) {
  throw AssertionFailure(fmt::format("internal error at {}:{}: {} ({})", where.file_name(), where.line(), message, condition));
}

}  // namespace annulus::detail
