// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "hdf5_open.hpp"

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace annulus {

/// Which other files a dataset's values lie in.
enum class SourceKind { virtual_source, external_link, external_storage };

/// The names under which HDF5 looks for a file that the file `holder` names, in its order. The first that exists is what it reads.
std::vector<std::string> places_of(SourceKind kind, const std::string& holder, const std::string& name);

/// All files that one input is read from, itself first. Of the HDF5 files among them those in use are open and locked, and the latest few:
/// a process may have only so many open, and a virtual dataset more parts.
class SourceFiles {
 public:
  /// `progress`, if any, is called by step().
  explicit SourceFiles(std::function<void()> progress = {}) : progress_(std::move(progress)) {}

  /// Tells whoever watches that the examination goes on: to be called between things that are finite for certain.
  void step() const {
    if (progress_) { progress_(); }
  }

  /// The open file of this path, opened if need be. `what` begins messages.
  /// @throws InvalidArgument as ReadableFile, or if another file is there than before or it was written
  std::shared_ptr<const ReadableFile> open(const std::string& what, const std::string& path);
  /// Notes a file of raw values.
  void add_raw(const std::string& path) { paths_.push_back(path); }

  /// The first existing of places_of(). @throws InvalidArgument naming `name` and the places if there is none
  static std::string find(const std::string& what, SourceKind kind, const std::string& holder, const std::string& name);

  const std::vector<std::string>& paths() const noexcept { return paths_; }

 private:
  std::function<void()> progress_;
  std::vector<std::string> paths_;
  struct Known {
    FileState state;
    std::weak_ptr<const ReadableFile> file;
  };
  std::map<std::string, Known> known_;                      ///< by path
  std::deque<std::shared_ptr<const ReadableFile>> latest_;  ///< the last used first
};

}  // namespace annulus
