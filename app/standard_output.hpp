// SPDX-License-Identifier: Apache-2.0
// Standard output is the result: what is printed arrives, or the program says that it did not.
#pragma once

#include <fmt/format.h>

#include <string_view>
#include <utility>

namespace annulus::app {

/// Opens those of the three standard descriptors that the parent closed, so that no file of ours gets their numbers and what is printed for
/// the user. Writing to them still fails. Call it first of all.
void hold_standard_descriptors();

/// Prints to standard output. A failure is kept for finish_output(), and nothing more is printed then: a long job goes on to its files.
void print_text(std::string_view text);

/// print_text() of a format and its values.
template <class... Values>
void say(fmt::format_string<Values...> format, Values&&... values) {
  print_text(fmt::format(format, std::forward<Values>(values)...));
}

/// Sends what was printed so far on its way.
void flush_output() noexcept;

/// Flushes and tests. @throws RuntimeFailure with the system's reason if anything that was printed could not be written
void finish_output();

/// What ends a document that is being printed, such as the bracket of a list: a signal handler prints it. Null: nothing is open.
/// @param ending a text that lives on
void set_open_ending(const char* ending) noexcept;

/// For signal handlers, async-signal-safe: ends the document that is open, unless the signal met it half printed.
void print_open_ending() noexcept;

}  // namespace annulus::app
