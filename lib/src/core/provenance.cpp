// SPDX-License-Identifier: Apache-2.0
#include <annulus/core/provenance.hpp>

#include <annulus/core/text.hpp>

#include <algorithm>
#include <array>
#include <string_view>
#include <unistd.h>

namespace annulus {

std::vector<std::pair<std::string, std::string>> recorded_environment() {
  constexpr std::array<std::string_view, 10> kPrefixes{"SLURM_", "OMPI_", "PMIX_",     "UCX_",  "NCCL_",
                                                       "CUDA_",  "OMP_",  "OPENBLAS_", "HDF5_", "ANNULUS_"};
  constexpr std::array<std::string_view, 4> kSecrets{"KEY", "TOKEN", "SECRET", "PASS"};
  std::vector<std::pair<std::string, std::string>> recorded;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const std::string_view name = text.substr(0, text.find('='));
    const bool wanted = name == "LD_LIBRARY_PATH" ||
                        std::any_of(kPrefixes.begin(), kPrefixes.end(), [&](std::string_view prefix) { return name.starts_with(prefix); });
    const bool secret =
        std::any_of(kSecrets.begin(), kSecrets.end(), [&](std::string_view word) { return name.find(word) != std::string_view::npos; });
    if (wanted && !secret && name.size() < text.size()) { recorded.emplace_back(printable(name), printable(text.substr(name.size() + 1))); }
  }
  std::sort(recorded.begin(), recorded.end());
  return recorded;
}

}  // namespace annulus
