// SPDX-License-Identifier: Apache-2.0
#include <annulus/io/examine_input.hpp>

#include <annulus/core/error.hpp>

#include "hdf5_handle.hpp"
#include "hdf5_input.hpp"

#include <poll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fcntl.h>
#include <functional>
#include <string_view>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <system_error>
#include <unistd.h>

namespace annulus {

namespace {

constexpr std::int64_t kSampledBytes = std::int64_t{32} << 20;
/// Beyond what this process has already: enough for any sample; a damaged size asks for more.
constexpr rlim_t kMemoryBytes = rlim_t{2} << 30U;

/// What the examining process writes: a step done, or its verdict, followed by a message.
constexpr char kStep = '.';
constexpr char kAccepted = 'a';
constexpr char kRefused = 'r';
constexpr char kDiskFailed = 'f';

void send(int pipe, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(pipe, bytes.data(), bytes.size());
    if (written < 0 && errno != EINTR) { return; }  // nobody listens any more
    bytes.remove_prefix(written > 0 ? static_cast<std::size_t>(written) : 0);
  }
}

void limit(int resource, rlim_t value) {
  rlimit bounds{};
  ::getrlimit(static_cast<__rlimit_resource>(resource), &bounds);
  bounds.rlim_cur = std::min(bounds.rlim_max, value);
  ::setrlimit(static_cast<__rlimit_resource>(resource), &bounds);
}

/// Lets this process compute for `seconds` more; then the kernel ends it.
void allow_cpu(int seconds) {
  rusage used{};
  ::getrusage(RUSAGE_SELF, &used);
  limit(RLIMIT_CPU, static_cast<rlim_t>(used.ru_utime.tv_sec + used.ru_stime.tv_sec + 1 + seconds));
}

/// Pages of address space in use.
rlim_t address_space() {
  unsigned long pages = 0;
  if (std::FILE* file = std::fopen("/proc/self/statm", "re")) {
    if (std::fscanf(file, "%lu", &pages) != 1) { pages = 0; }
    std::fclose(file);
  }
  return static_cast<rlim_t>(pages) * static_cast<rlim_t>(::sysconf(_SC_PAGESIZE));
}

/// Reads samples of an input, and calls what it is given at every step that is finite for certain.
using ReadSamples = std::function<void(const std::function<void()>& progress)>;

/// The examining process. No crash of it leaves a core file or a word; it ends with its parent.
[[noreturn]] void examine(const std::string& path, const ReadSamples& read, const ExamineLimits& limits, int pipe) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  for (int signal = 1; signal < NSIG; ++signal) { std::signal(signal, SIG_DFL); }
  const int null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  for (const int descriptor : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) { ::dup2(null, descriptor); }
  limit(RLIMIT_CORE, 0);
  if (const rlim_t used = address_space(); used > 0) { limit(RLIMIT_AS, used + kMemoryBytes); }
  allow_cpu(limits.cpu_s);
  std::string verdict(1, kAccepted);
  try {
    read([&] {
      allow_cpu(limits.cpu_s);
      send(pipe, std::string_view(&kStep, 1));
    });
  } catch (const Hdf5Failure& error) {
    // What no file that HDF5 wrote lets fail.
    verdict = kRefused + fmt::format("input file '{}' is damaged: {}", path, error.what());
  } catch (const RuntimeFailure& error) { verdict = kDiskFailed + std::string(error.what()); } catch (const Error& error) {
    verdict = kRefused + std::string(error.what());
  } catch (const std::exception& error) { verdict = kRefused + fmt::format("input file '{}' is damaged: {}", path, error.what()); }
  send(pipe, verdict);
  ::_exit(0);
}

/// Reads until the other side closes; false after `silent_s` seconds without a byte.
bool receive(int pipe, int silent_s, std::string& text) {
  std::array<char, 4096> buffer{};
  while (true) {
    pollfd ready{pipe, POLLIN, 0};
    const int count = ::poll(&ready, 1, silent_s * 1000);
    if (count == 0) { return false; }
    const ssize_t got = count < 0 ? -1 : ::read(pipe, buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) { continue; }
    if (got <= 0) { return true; }
    text.append(buffer.data(), static_cast<std::size_t>(got));
  }
}

void examine_by(const std::string& path, const ReadSamples& read, const ExamineLimits& limits) {
  const auto require = [&](bool succeeded) {
    if (!succeeded) {
      throw RuntimeFailure(
          fmt::format("no process can be started to examine input file '{}': {}", path, std::generic_category().message(errno)));
    }
  };
  std::array<int, 2> pipe{};
  require(::pipe2(pipe.data(), O_CLOEXEC) == 0);
  const pid_t child = ::fork();
  if (child == 0) { examine(path, read, limits, pipe[1]); }
  const int fork_error = errno;
  ::close(pipe[1]);
  std::string text;
  const bool answered = child > 0 && receive(pipe[0], limits.silent_s, text);
  ::close(pipe[0]);
  errno = fork_error;
  require(child > 0);
  if (!answered) { ::kill(child, SIGKILL); }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {}

  text.erase(0, std::min(text.find_first_not_of(kStep), text.size()));
  ANNULUS_EXPECTS(answered, "input file '{}': nothing came from it for {} seconds", path, limits.silent_s);
  ANNULUS_EXPECTS(!text.empty() || !WIFSIGNALED(status) || WTERMSIG(status) != SIGXCPU,
                  "input file '{}' is damaged: HDF5 {}.{}.{} does not come to an end on it", path, H5_VERS_MAJOR, H5_VERS_MINOR,
                  H5_VERS_RELEASE);
  ANNULUS_EXPECTS(!text.empty(), "input file '{}' is damaged: HDF5 {}.{}.{} crashes on it ({})", path, H5_VERS_MAJOR, H5_VERS_MINOR,
                  H5_VERS_RELEASE, WIFSIGNALED(status) ? ::strsignal(WTERMSIG(status)) : "without a word");
  if (text[0] == kDiskFailed) { throw RuntimeFailure(text.substr(1)); }
  if (text[0] == kRefused) { throw InvalidArgument(text.substr(1)); }
}

}  // namespace

void examine_input(const std::string& path, InputUse use, const ExamineLimits& limits) {
  examine_by(path, [&](const std::function<void()>& progress) { read_samples(path, use, kSampledBytes, progress); }, limits);
}

void examine_layer_input(const std::string& path, std::optional<std::int64_t> heads, const ExamineLimits& limits) {
  examine_by(path, [&](const std::function<void()>& progress) { read_layer_samples(path, heads, kSampledBytes, progress); }, limits);
}

}  // namespace annulus
