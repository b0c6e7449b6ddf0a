// SPDX-License-Identifier: Apache-2.0
#include "config_file.hpp"

#include <annulus/core/error.hpp>
#include <annulus/core/text.hpp>

#include "old_names.hpp"

#include <toml++/toml.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <fcntl.h>
#include <filesystem>
#include <memory>
#include <sstream>
#include <sys/stat.h>
#include <system_error>
#include <unistd.h>

namespace annulus::app {

namespace {

Value value_of(const Option& option, const toml::node& node, const std::string& where) {
  switch (option.kind) {
    case ValueKind::integer:
      if (const auto number = node.value_exact<std::int64_t>()) { return *number; }
      throw InvalidArgument(fmt::format("{}: {} is not an integer", where, option.name));
    case ValueKind::real: {
      const auto number = node.is_number() ? node.value<double>() : std::nullopt;
      ANNULUS_EXPECTS(number.has_value() && std::isfinite(*number), "{}: {} is not a finite number", where, option.name);
      return *number;
    }
    case ValueKind::boolean:
      if (const auto flag = node.value_exact<bool>()) { return *flag; }
      throw InvalidArgument(fmt::format("{}: {} is neither true nor false", where, option.name));
    case ValueKind::counts:
      if (const auto number = node.value_exact<std::int64_t>()) { return std::vector{*number}; }
      [[fallthrough]];
    case ValueKind::integers: {
      std::vector<std::int64_t> numbers;
      const toml::array* array = node.as_array();
      ANNULUS_EXPECTS(array != nullptr, "{}: {} is not a list of integers", where, option.name);
      for (const toml::node& element : *array) {
        const auto number = element.value_exact<std::int64_t>();
        ANNULUS_EXPECTS(number.has_value(), "{}: {} is not a list of integers", where, option.name);
        numbers.push_back(*number);
      }
      return numbers;
    }
    case ValueKind::texts: {
      std::vector<std::string> texts;
      const toml::array* array = node.as_array();
      ANNULUS_EXPECTS(array != nullptr, "{}: {} is not a list of strings", where, option.name);
      for (const toml::node& element : *array) {
        const auto text = element.value_exact<std::string>();
        ANNULUS_EXPECTS(text.has_value(), "{}: {} is not a list of strings", where, option.name);
        texts.push_back(*text);
      }
      return texts;
    }
    case ValueKind::text:
      break;
  }
  if (const auto text = node.value_exact<std::string>()) { return *text; }
  throw InvalidArgument(fmt::format("{}: {} is not a string", where, option.name));
}

std::string in_toml(const Value& value) {
  if (const auto* text = std::get_if<std::string>(&value)) { return toml_string(*text); }
  if (const auto* numbers = std::get_if<std::vector<std::int64_t>>(&value)) { return fmt::format("[{}]", fmt::join(*numbers, ", ")); }
  if (const auto* texts = std::get_if<std::vector<std::string>>(&value)) {
    std::vector<std::string> quoted;
    for (const std::string& text : *texts) { quoted.push_back(toml_string(text)); }
    return fmt::format("[{}]", fmt::join(quoted, ", "));
  }
  if (const auto* real = std::get_if<double>(&value)) {
    // The shortest text that reads back to the same number; TOML tells floats from integers by the point.
    const std::string text = fmt::format("{}", *real);
    return text.find_first_of(".e") == std::string::npos ? text + ".0" : text;
  }
  return text_of(value);
}

}  // namespace

bool is_regular_file(const std::string& path) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

bool is_pipe(const std::string& path) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0 && S_ISFIFO(status.st_mode);
}

std::string toml_string(const std::string& text) {
  std::string quoted = "\"";
  for (const char letter : text) {
    const auto byte = static_cast<unsigned char>(letter);
    if (letter == '"' || letter == '\\') { quoted += '\\'; }
    if (byte < 0x20U || byte == 0x7fU) {
      quoted += fmt::format("\\u{:04x}", byte);
    } else {
      quoted += letter;
    }
  }
  return quoted + '"';
}

std::string read_config(const std::string& path) {
  const auto require = [&](bool succeeded, int error) {
    ANNULUS_EXPECTS(succeeded, "configuration file '{}': {}", path, std::generic_category().message(error));
  };
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  require(descriptor >= 0, errno);
  const std::unique_ptr<const int, void (*)(const int*)> closed(&descriptor, [](const int* open) { ::close(*open); });
  struct stat status{};
  require(::fstat(descriptor, &status) == 0, errno);
  require(!S_ISDIR(status.st_mode), EISDIR);
  ANNULUS_EXPECTS(S_ISREG(status.st_mode) || S_ISFIFO(status.st_mode),
                  "configuration file '{}' is a device or socket, neither a file nor a pipe", path);
  std::string text;
  constexpr std::size_t kMostBytes = std::size_t{16} << 20;
  std::array<char, 65536> buffer{};
  while (true) {
    const ssize_t got = ::read(descriptor, buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) { continue; }
    require(got >= 0, errno);
    if (got == 0) { return text; }
    text.append(buffer.data(), static_cast<std::size_t>(got));
    ANNULUS_EXPECTS(text.size() <= kMostBytes, "configuration file '{}' has more than {} bytes; it cannot be a configuration", path,
                    kMostBytes);
  }
}

void apply_config(Draft& draft, const std::string& text, const std::string& path) {
  toml::table table;
  try {
    table = toml::parse(text, path);
  } catch (const toml::parse_error& error) {
    // What is quoted of the file may hold its line ends.
    throw InvalidArgument(fmt::format("{}:{}: {}", path, error.source().begin.line, printable(error.description())));
  }
  const auto take = [&](const std::string& name, const toml::node& node) {
    const std::string where = fmt::format("{}:{}", path, node.source().begin.line);
    const Option* option = find_option(name);
    ANNULUS_EXPECTS(option != nullptr, "{}: unknown key {}", where, printable(name));
    try {
      apply(draft, *option, value_of(*option, node, where));
    } catch (const InvalidArgument& error) {
      const std::string message = printable(error.what());
      throw InvalidArgument(message.starts_with(where) ? message : where + ": " + message);
    }
  };
  for (const auto& [key, node] : table) {
    const std::string name(key.str());
    const toml::table* section = node.as_table();
    if (name != "layer" || section == nullptr) {
      take(name, node);
      continue;
    }
    if (!draft.config.layer) { draft.config.layer.emplace(); }  // an empty section is one
    for (const auto& [inner, value] : *section) { take(fmt::format("{}.{}", name, inner.str()), value); }
  }
}

namespace {

/// Where the presets are: beside an installed program, or in the source tree.
std::filesystem::path preset_folder() {
  std::error_code ignored;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", ignored);
  const std::filesystem::path installed = program.parent_path().parent_path() / "share" / "annulus" / "presets";
  return std::filesystem::is_directory(installed, ignored) ? installed : std::filesystem::path(ANNULUS_SOURCE_PRESETS);
}

/// Sorted.
std::vector<std::string> preset_names(const std::filesystem::path& folder) {
  std::error_code ignored;
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    if (entry.path().extension() == ".toml") { names.push_back(entry.path().stem().string()); }
  }
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace

std::string preset_path(const std::string& asked) {
  const std::string name(preset_of_class(asked).value_or(asked));
  const std::filesystem::path folder = preset_folder();
  const std::vector<std::string> names = preset_names(folder);
  if (std::find(names.begin(), names.end(), name) == names.end()) {
    const std::string_view replacement = replacement_of(name);
    ANNULUS_EXPECTS(replacement.empty(), "--preset {} is no preset here: it {}", name, replacement);
    throw InvalidArgument(fmt::format("--preset {} does not exist; there are {} in {}", name, fmt::join(names, ", "), folder.string()));
  }
  return (folder / (name + ".toml")).string();
}

std::string preset_list() {
  const std::filesystem::path folder = preset_folder();
  std::string list;
  for (const std::string& name : preset_names(folder)) {
    const std::string text = read_config((folder / (name + ".toml")).string());
    const std::string line = text.substr(0, text.find('\n'));
    list += fmt::format("{:<18} {}\n", name, line.starts_with("# ") ? line.substr(2) : line);
  }
  return list;
}

std::string to_toml(const Config& config, Command command) {
  std::string text;
  // What an input file will say is not claimed here.
  const auto from_input = [&](std::string_view name) {
    constexpr std::array<std::string_view, 13> kOfInput{
        "batch",      "seq-len",    "heads",        "kv-heads",          "head-dim",      "layer.embed", "layer.kdim",
        "layer.vdim", "layer.bias", "layer.rotary", "layer.rotary-base", "layer.bias-kv", "extra-keys"};
    return !config.input.empty() && !config.given.contains(name) && std::find(kOfInput.begin(), kOfInput.end(), name) != kOfInput.end();
  };
  for (const Option& option : options()) {
    Value value;
    if (from_input(option.name) || !option.is_of(command)) { continue; }
    if (option.get(config, value)) { text += fmt::format("{} = {}\n", option.name, in_toml(value)); }
  }
  return text;
}

}  // namespace annulus::app
