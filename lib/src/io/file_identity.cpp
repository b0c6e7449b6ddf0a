// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/file_identity.hpp>

#include <annulus/core/error.hpp>

#include <array>
#include <climits>
#include <filesystem>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

namespace annulus {

namespace {

namespace fs = std::filesystem;

constexpr int kMostLinks = 40;  // as the kernel

std::string described(const NamedFile& file) {
  return file.use == FileUse::printed ? file.role : fmt::format("{} '{}'", file.role, file.path);
}

const char* done_with(const NamedFile& file) { return file.use == FileUse::read ? "read" : "written"; }

}  // namespace

FileIdentity identify_file(const std::string& path) {
  struct stat status{};
  if (::stat(path.c_str(), &status) == 0) { return {status.st_dev, status.st_ino, {}}; }
  // A link that leads to nothing yet means what it leads to.
  fs::path target = path;
  for (int links = 0; links < kMostLinks && ::lstat(target.c_str(), &status) == 0 && S_ISLNK(status.st_mode); ++links) {
    std::array<char, PATH_MAX> next{};
    const ssize_t length = ::readlink(target.c_str(), next.data(), next.size());
    if (length <= 0) { break; }
    target = target.parent_path() / std::string(next.data(), static_cast<std::size_t>(length));
  }
  const std::string folder = target.has_parent_path() ? target.parent_path().string() : ".";
  if (::stat(folder.c_str(), &status) == 0) { return {status.st_dev, status.st_ino, target.filename().string()}; }
  std::error_code ignored;
  return {0, 0, fs::absolute(target, ignored).lexically_normal().string()};
}

void require_distinct_files(const std::vector<NamedFile>& files) {
  std::vector<FileIdentity> identities;
  for (const NamedFile& file : files) { identities.push_back(identify_file(file.path)); }
  for (std::size_t second = 0; second < files.size(); ++second) {
    for (std::size_t first = 0; first < second; ++first) {
      const bool may_share = files[first].use == files[second].use && files[first].use != FileUse::written;
      if (may_share || identities[first] != identities[second]) { continue; }
      const bool second_reads = files[second].use == FileUse::read;
      const NamedFile& written = files[second_reads ? first : second];
      const NamedFile& other = files[second_reads ? second : first];
      throw InvalidArgument(fmt::format("{} is the same file as {}, which is {}{}", described(written), described(other), done_with(other),
                                        written.use == FileUse::written ? "; --force does not allow that" : ""));
    }
  }
}

}  // namespace annulus
