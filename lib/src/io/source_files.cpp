// SPDX-License-Identifier: Apache-2.0
#include "source_files.hpp"

#include <annulus/core/error.hpp>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string_view>
#include <sys/stat.h>

namespace annulus {

namespace {

namespace fs = std::filesystem;

/// Files that stay open though nothing of them is.
constexpr std::size_t kMostIdleFiles = 32;

std::string environment(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? "" : text;
}

/// `prefix` with a leading ${ORIGIN} replaced by the folder of the file that names the other one.
fs::path with_origin(std::string_view prefix, const fs::path& folder) {
  constexpr std::string_view kOrigin = "${ORIGIN}";
  return prefix.starts_with(kOrigin) ? fs::path(folder.string() + std::string(prefix.substr(kOrigin.size()))) : fs::path(prefix);
}

}  // namespace

std::vector<std::string> places_of(SourceKind kind, const std::string& holder, const std::string& name) {
  std::error_code ignored;
  const fs::path folder = fs::absolute(holder, ignored).parent_path();
  if (kind == SourceKind::external_storage) {
    const std::string prefix = environment("HDF5_EXTFILE_PREFIX");
    if (prefix.empty() || prefix == "." || fs::path(name).is_absolute()) { return {name}; }
    return {(with_origin(prefix, folder) / name).string()};
  }
  std::vector<std::string> places;
  fs::path relative = name;
  if (relative.is_absolute()) {
    places.push_back(name);
    relative = relative.filename();  // HDF5 then looks for the last part of the name elsewhere
  }
  const std::string prefixes = environment(kind == SourceKind::virtual_source ? "HDF5_VDS_PREFIX" : "HDF5_EXT_PREFIX");
  for (std::size_t begin = 0; begin < prefixes.size();) {
    const std::size_t end = std::min(prefixes.find(':', begin), prefixes.size());
    if (end > begin) { places.push_back((fs::path(prefixes.substr(begin, end - begin)) / relative).string()); }
    begin = end + 1;
  }
  if (kind == SourceKind::virtual_source && !prefixes.empty()) { places.push_back((with_origin(prefixes, folder) / relative).string()); }
  places.push_back((folder / relative).string());
  places.push_back(relative.string());
  places.push_back((fs::canonical(holder, ignored).parent_path() / relative).string());
  return places;
}

std::string SourceFiles::find(const std::string& what, SourceKind kind, const std::string& holder, const std::string& name) {
  std::vector<std::string> places = places_of(kind, holder, name);
  for (const std::string& place : places) {
    struct stat status{};
    if (::stat(place.c_str(), &status) == 0) { return place; }
  }
  std::vector<std::string> shown;
  for (const std::string& place : places) {
    if (std::find(shown.begin(), shown.end(), place) == shown.end()) { shown.push_back(place); }
  }
  throw InvalidArgument(fmt::format("{} needs the file '{}', which is missing; looked for {}", what, name, fmt::join(shown, ", ")));
}

std::shared_ptr<const ReadableFile> SourceFiles::open(const std::string& what, const std::string& path) {
  const auto known = known_.find(path);
  std::shared_ptr<const ReadableFile> file = known == known_.end() ? nullptr : known->second.file.lock();
  if (!file) {
    file = std::make_shared<const ReadableFile>(what, path);
    if (known == known_.end()) {
      known_.emplace(path, Known{file->state(), file});
      paths_.push_back(path);
    } else {
      ANNULUS_EXPECTS(known->second.state == file->state(), "{} was changed while it was read", what);
      known->second.file = file;
    }
  }
  if (const auto place = std::find(latest_.begin(), latest_.end(), file); place != latest_.end()) { latest_.erase(place); }
  latest_.push_front(file);
  if (latest_.size() > kMostIdleFiles) { latest_.pop_back(); }
  return file;
}

}  // namespace annulus
