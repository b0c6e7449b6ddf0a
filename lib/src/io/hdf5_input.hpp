// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <annulus/io/source.hpp>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace annulus {

/// open_input() and then `bytes` of values of its datasets, spread over them; all if there are no more. Calls `progress` at every step that
/// is finite for certain.
/// @throws as open_input() and TensorSource::read()
void read_samples(const std::string& path, InputUse use, std::int64_t bytes, const std::function<void()>& progress);

/// The same of open_layer_input(), with a share of at least some rows of each dataset.
void read_layer_samples(const std::string& path, std::optional<std::int64_t> heads, std::int64_t bytes,
                        const std::function<void()>& progress);

}  // namespace annulus
