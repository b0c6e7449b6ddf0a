// SPDX-License-Identifier: Apache-2.0
// The parts of a virtual dataset.
#pragma once

#include "complete_dataset.hpp"
#include "virtual_mapping.hpp"

#include <cstddef>
#include <string>

namespace annulus {

/// require_complete() for a virtual layout.
void require_complete_parts(const DatasetPlace& place, hid_t creation, SourceFiles& files);

/// Where a dataset is that a virtual one takes values from.
struct PartPlace {
  std::string file;
  std::string dataset;
  std::string what;  ///< for messages
  int depth = 0;
};

/// The number of parts of a virtual dataset with these creation properties.
std::size_t count_parts(const DatasetPlace& place, hid_t creation);

/// @throws InvalidArgument if its file is missing, or it is one of numbered parts
PartPlace find_part(const DatasetPlace& place, hid_t creation, std::size_t index);

/// @throws InvalidArgument if it is missing or damaged
OpenedDataset open_part(const PartPlace& part, SourceFiles& files);

/// Where the elements of an open part lie in the virtual dataset. @throws InvalidArgument if no arithmetic on indices tells
VirtualMapping mapping_of(const DatasetPlace& place, hid_t creation, std::size_t index, const PartPlace& part, hid_t part_dataset);

}  // namespace annulus
