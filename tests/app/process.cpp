// SPDX-License-Identifier: Apache-2.0
#include "process.hpp"

#include <poll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <signal.h>
#include <stdexcept>
#include <sys/wait.h>
#include <unistd.h>

namespace annulus::test {

namespace {

/// Appends what can be read now; false at the end.
bool drain(int descriptor, std::string& text) {
  std::array<char, 4096> buffer{};
  while (true) {
    const ssize_t got = read(descriptor, buffer.data(), buffer.size());
    if (got > 0) {
      text.append(buffer.data(), static_cast<std::size_t>(got));
    } else {
      return got < 0 && (errno == EAGAIN || errno == EINTR);
    }
  }
}

[[noreturn]] void become(const std::vector<std::string>& arguments, const std::vector<std::string>& environment) {
  for (const std::string& entry : environment) {
    const std::size_t equals = entry.find('=');
    if (equals == std::string::npos) {
      unsetenv(entry.c_str());
    } else {
      setenv(entry.substr(0, equals).c_str(), entry.c_str() + equals + 1, 1);
    }
  }
  std::vector<char*> argv;
  for (const std::string& argument : arguments) { argv.push_back(const_cast<char*>(argument.c_str())); }
  argv.push_back(nullptr);
  execvp(argv[0], argv.data());
  _exit(127);
}

}  // namespace

ProcessResult run_process(const std::vector<std::string>& arguments, double limit_s, const std::vector<std::string>& environment,
                          const std::function<void(pid_t)>& meanwhile) {
  std::array<int, 2> out{};
  std::array<int, 2> err{};
  if (pipe(out.data()) != 0 || pipe(err.data()) != 0) { throw std::runtime_error("pipe failed"); }
  const auto start = std::chrono::steady_clock::now();
  const pid_t child = fork();
  if (child == 0) {
    setpgid(0, 0);
    dup2(out[1], STDOUT_FILENO);
    dup2(err[1], STDERR_FILENO);
    for (const int descriptor : {out[0], out[1], err[0], err[1]}) { close(descriptor); }
    const int null = open("/dev/null", O_RDONLY);
    dup2(null, STDIN_FILENO);
    become(arguments, environment);
  }
  close(out[1]);
  close(err[1]);
  fcntl(out[0], F_SETFL, O_NONBLOCK);
  fcntl(err[0], F_SETFL, O_NONBLOCK);
  ProcessResult result;
  int status = 0;
  while (true) {
    std::array<pollfd, 2> descriptors{{{out[0], POLLIN, 0}, {err[0], POLLIN, 0}}};
    poll(descriptors.data(), descriptors.size(), 10);
    drain(out[0], result.out);
    drain(err[0], result.err);
    result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (waitpid(child, &status, WNOHANG) == child) { break; }
    if (meanwhile) { meanwhile(child); }
    if (result.seconds > limit_s) {
      result.timed_out = true;
      for (const pid_t stray : descendants_named(child, "")) { kill(stray, SIGKILL); }
      kill(-child, SIGKILL);
      waitpid(child, &status, 0);
      break;
    }
  }
  drain(out[0], result.out);
  drain(err[0], result.err);
  close(out[0]);
  close(err[0]);
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return result;
}

double seconds_since(const std::string& text, const std::string& mark) {
  const std::size_t place = text.find(mark);
  if (place == std::string::npos) { return -1; }
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count() - static_cast<double>(std::stoll(text.substr(place + mark.size()))) / 1e3;
}

std::vector<pid_t> descendants_named(pid_t ancestor, const std::string& name) {
  std::map<pid_t, std::pair<pid_t, std::string>> processes;  // pid -> parent, name
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const std::string folder = entry.path().filename();
    if (folder.find_first_not_of("0123456789") != std::string::npos) { continue; }
    std::ifstream file(entry.path() / "stat");
    const std::string stat((std::istreambuf_iterator<char>(file)), {});
    const std::size_t open = stat.find('(');
    const std::size_t close = stat.rfind(')');
    if (open == std::string::npos || close == std::string::npos) { continue; }
    pid_t parent = 0;
    char state = 0;
    if (sscanf(stat.c_str() + close + 1, " %c %d", &state, &parent) != 2) { continue; }
    processes[static_cast<pid_t>(std::stol(folder))] = {parent, stat.substr(open + 1, close - open - 1)};
  }
  std::vector<pid_t> found;
  for (const auto& [pid, about] : processes) {
    if (!name.empty() && about.second != name.substr(0, 15)) { continue; }
    pid_t above = about.first;
    while (above > 1 && above != ancestor && processes.contains(above)) { above = processes[above].first; }
    if (above == ancestor) { found.push_back(pid); }
  }
  return found;
}

bool has_open_file_below(pid_t pid, const std::string& prefix) {
  std::error_code error;
  const std::filesystem::path descriptors = "/proc/" + std::to_string(pid) + "/fd";
  for (auto entry = std::filesystem::directory_iterator(descriptors, error); !error && entry != std::filesystem::directory_iterator();
       entry.increment(error)) {
    std::error_code closed;
    if (std::filesystem::read_symlink(*entry, closed).string().starts_with(prefix)) { return true; }
  }
  return false;
}

std::string environment_of(pid_t pid, const std::string& name) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/environ");
  const std::string all((std::istreambuf_iterator<char>(file)), {});
  for (std::size_t begin = 0; begin < all.size();) {
    const std::size_t end = std::min(all.find('\0', begin), all.size());
    const std::string entry = all.substr(begin, end - begin);
    if (entry.starts_with(name + "=")) { return entry.substr(name.size() + 1); }
    begin = end + 1;
  }
  return {};
}

std::int64_t asked_for(const char* name, std::int64_t otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoll(text);
}

}  // namespace annulus::test
