// SPDX-License-Identifier: Apache-2.0
// File systems that cannot do everything, and disks that fail: LD_PRELOAD=<this> FAIL_RENAMEAT2=22 FAIL_LINK=38 program ...
// Each variable is the errno that calls of its name end with: FAIL_RENAMEAT2 (with flags), FAIL_RENAME, FAIL_LINK, FAIL_FLOCK, FAIL_FSYNC,
// FAIL_FALLOCATE, FAIL_TMPFILE (open of a file without a name); FAIL_WRITE after the first FAIL_WRITE_AFTER bytes that go to unfinished
// results. FAIL_RANK: only on this rank of a job. RAISE_IN_FSYNC: a signal that the process gets when it syncs. Without its variable a call
// is the real one.
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <string_view>
#include <sys/types.h>
#include <unistd.h>

namespace {

long number(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtol(text, nullptr, 10);
}

/// Whether the call of this name fails here; errno is then set.
bool fails(const char* name) {
  const long error = number(name, 0);
  if (error == 0) { return false; }
  const long rank = number("FAIL_RANK", -1);
  if (rank >= 0 && rank != number("OMPI_COMM_WORLD_RANK", -1)) { return false; }
  errno = static_cast<int>(error);
  return true;
}

/// The function that this one stands in front of.
template <class Function>
Function* real(const char* name) {
  return std::bit_cast<Function*>(dlsym(RTLD_NEXT, name));
}

bool is_unfinished_result(int descriptor) {
  std::array<char, 64> link{};
  std::array<char, 4096> path{};
  std::snprintf(link.data(), link.size(), "/proc/self/fd/%d", descriptor);
  if (readlink(link.data(), path.data(), path.size() - 1) <= 0) { return false; }
  const std::string_view name(path.data());
  const bool nameless = name.find("/#") != std::string_view::npos && name.ends_with(" (deleted)");
  return nameless || name.find(".partial-") != std::string_view::npos;
}

/// Whether this write is one too many.
bool write_fails(int descriptor, std::size_t bytes) {
  static std::atomic<long> written{0};
  if (std::getenv("FAIL_WRITE") == nullptr || !is_unfinished_result(descriptor)) { return false; }
  return written.fetch_add(static_cast<long>(bytes)) + static_cast<long>(bytes) > number("FAIL_WRITE_AFTER", 0) && fails("FAIL_WRITE");
}

}  // namespace

extern "C" {

int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) {
  if (flags != 0 && fails("FAIL_RENAMEAT2")) { return -1; }
  return real<int(int, const char*, int, const char*, unsigned)>("renameat2")(from_folder, from, to_folder, to, flags);
}
int rename(const char* from, const char* to) {
  if (fails("FAIL_RENAME")) { return -1; }
  return real<int(const char*, const char*)>("rename")(from, to);
}
int link(const char* from, const char* to) {
  if (fails("FAIL_LINK")) { return -1; }
  return real<int(const char*, const char*)>("link")(from, to);
}
int linkat(int from_folder, const char* from, int to_folder, const char* to, int flags) {
  if (fails("FAIL_LINK")) { return -1; }
  return real<int(int, const char*, int, const char*, int)>("linkat")(from_folder, from, to_folder, to, flags);
}
int open(const char* path, int flags, ...) {
  if ((flags & O_TMPFILE) == O_TMPFILE && fails("FAIL_TMPFILE")) { return -1; }
  std::va_list rest;
  va_start(rest, flags);
  const auto mode = (flags & (O_CREAT | __O_TMPFILE)) != 0 ? va_arg(rest, mode_t) : mode_t{0};
  va_end(rest);
  return real<int(const char*, int, ...)>("open")(path, flags, mode);
}
int lock_file(int descriptor, int operation) __asm__("flock");  // C++ has a struct of the call's own name
int lock_file(int descriptor, int operation) {
  if (fails("FAIL_FLOCK")) { return -1; }
  return real<int(int, int)>("flock")(descriptor, operation);
}
int fsync(int descriptor) {
  if (const long signal = number("RAISE_IN_FSYNC", 0); signal != 0) { raise(static_cast<int>(signal)); }
  if (fails("FAIL_FSYNC")) { return -1; }
  return real<int(int)>("fsync")(descriptor);
}
int fallocate(int descriptor, int mode, off_t offset, off_t bytes) {
  if (fails("FAIL_FALLOCATE")) { return -1; }
  return real<int(int, int, off_t, off_t)>("fallocate")(descriptor, mode, offset, bytes);
}
ssize_t write(int descriptor, const void* data, std::size_t bytes) {
  if (write_fails(descriptor, bytes)) { return -1; }
  return real<ssize_t(int, const void*, std::size_t)>("write")(descriptor, data, bytes);
}
ssize_t pwrite(int descriptor, const void* data, std::size_t bytes, off_t offset) {
  if (write_fails(descriptor, bytes)) { return -1; }
  return real<ssize_t(int, const void*, std::size_t, off_t)>("pwrite")(descriptor, data, bytes, offset);
}
ssize_t pwrite64(int descriptor, const void* data, std::size_t bytes, off64_t offset) {
  if (write_fails(descriptor, bytes)) { return -1; }
  return real<ssize_t(int, const void*, std::size_t, off64_t)>("pwrite64")(descriptor, data, bytes, offset);
}

}  // extern "C"
