// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace annulus {

/// A text file that grows while it is worked for: after every write() the whole text so far is at its place, put there by the atomic rule
/// of ResultFile. Until the first one there is nothing.
class TextResult {
 public:
  /// @param least_bytes that there must be room for
  /// @throws InvalidArgument as check_result_path(), or if the file cannot be created or there is no room
  TextResult(const std::string& path, bool force, std::int64_t least_bytes = 0);
  ~TextResult();
  TextResult(const TextResult&) = delete;
  TextResult& operator=(const TextResult&) = delete;

  /// @throws RuntimeFailure if the disk refuses, or another program took the place: what was there stays
  void write(std::string_view text);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace annulus
