// SPDX-License-Identifier: Apache-2.0
// What a result file says of itself, for those who ask how it was made or how far it is.
#pragma once

#include <annulus/core/named_column.hpp>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace annulus {

struct ResultContents {
  /// A dataset beside the folders: /o, /lse, gradients.
  struct Dataset {
    std::string name;
    std::vector<std::int64_t> extents;
    std::string dtype;  ///< "bf16"
  };
  std::vector<Dataset> datasets;                                ///< by name
  std::vector<std::pair<std::string, std::string>> provenance;  ///< by name
  std::vector<NamedColumn> parts;                               ///< a value for each part of the batch, by name; none where it is whole
};

/// Reads neither values of datasets nor timings.
/// @throws InvalidArgument if the file cannot be read, is being written, or is no result
ResultContents read_result_contents(const std::string& path);

}  // namespace annulus
