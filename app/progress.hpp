// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

namespace annulus::app {

/// One line on standard error that replaces itself; silent unless enabled and standard error is a terminal.
class Progress {
 public:
  explicit Progress(bool enabled);
  /// Shows `text`; empty clears the line.
  void show(std::string_view text) const;

 private:
  bool active_;
};

}  // namespace annulus::app
