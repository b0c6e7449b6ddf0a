// SPDX-License-Identifier: Apache-2.0
// Bytes that are not text: file names and variables may hold any, while JSON, TOML and HDF5 strings are UTF-8.
#pragma once

#include <string>
#include <string_view>

namespace annulus {

/// Whether `bytes` are well-formed UTF-8 (RFC 3629: no overlong forms, no surrogates, nothing beyond U+10FFFF).
bool is_utf8(std::string_view bytes);

/// `bytes` for a terminal or a report: bytes that are not UTF-8 and control characters become \xNN.
std::string printable(std::string_view bytes);

}  // namespace annulus
