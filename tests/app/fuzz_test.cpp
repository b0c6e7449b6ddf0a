// SPDX-License-Identifier: Apache-2.0
// Damaged and odd inputs and configurations, seeded: the program must neither crash nor hang, and what it computes from a file must be what
// another reading of the same file gives. ANNULUS_FUZZ_CASES and ANNULUS_FUZZ_SEED ask for more, or others.
#include <annulus_test.hpp>

#include "process.hpp"

#include <hdf5.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

using namespace annulus::test;

namespace {

using Random = std::mt19937_64;

std::uint64_t below(Random& random, std::uint64_t bound) { return random() % bound; }

std::string read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

/// Bits flipped, bytes set, runs cleared, copied or cut off.
void mutate(std::string& bytes, Random& random) {
  const auto place = [&] { return static_cast<std::size_t>(below(random, bytes.size())); };
  for (std::uint64_t count = 1 + below(random, 4); count > 0 && !bytes.empty(); --count) {
    switch (below(random, 8)) {
      case 0:
      case 1:
      case 2:
        bytes[place()] ^= static_cast<char>(1U << below(random, 8));
        break;
      case 3:
        bytes[place()] = static_cast<char>(below(random, 256));
        break;
      case 4:
        bytes[place()] = below(random, 2) == 0 ? '\xff' : '\0';
        break;
      case 5: {
        const std::size_t begin = place();
        std::fill_n(bytes.begin() + static_cast<std::ptrdiff_t>(begin), std::min<std::size_t>(bytes.size() - begin, 1 + below(random, 16)),
                    below(random, 2) == 0 ? '\xff' : '\0');
        break;
      }
      case 6: {
        const std::size_t from = place();
        const std::string run = bytes.substr(from, 1 + below(random, 32));
        const std::size_t to = place();
        bytes.replace(to, std::min(run.size(), bytes.size() - to), run);
        break;
      }
      default:
        if (below(random, 4) == 0) { bytes.resize(place()); }
        break;
    }
  }
}

hid_t half_type(std::size_t exponent_bits) {
  const hid_t type = H5Tcopy(H5T_IEEE_F32LE);
  H5Tset_fields(type, 15, 15 - exponent_bits, exponent_bits, 0, 15 - exponent_bits);
  H5Tset_size(type, 2);
  H5Tset_ebias(type, (std::size_t{1} << (exponent_bits - 1)) - 1);
  return type;
}

using Shape = std::vector<hsize_t>;

/// How a valid input is laid out.
struct Layout {
  bool newest = false;  ///< format: the newest that this HDF5 writes, or the oldest
  hid_t type = H5I_INVALID_HID;
  Shape q;
  Shape kv;
  std::function<void(hid_t, const Shape&)> prepare;  ///< creation properties for a shape
  bool grows = false;
};

void write_dataset(hid_t file, const char* name, const Layout& layout, const Shape& shape, Random& random) {
  const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
  if (layout.prepare) { layout.prepare(creation, shape); }
  const Shape unlimited(shape.size(), H5S_UNLIMITED);
  const hid_t space = H5Screate_simple(static_cast<int>(shape.size()), shape.data(), layout.grows ? unlimited.data() : nullptr);
  const hid_t dataset = H5Dcreate2(file, name, layout.type, space, H5P_DEFAULT, creation, H5P_DEFAULT);
  if (dataset >= 0) {
    std::vector<float> values(static_cast<std::size_t>(std::max<hssize_t>(0, H5Sget_simple_extent_npoints(space))));
    for (float& value : values) { value = static_cast<float>(static_cast<int>(below(random, 33)) - 16) / 8.0F; }
    if (!values.empty()) { H5Dwrite(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()); }
    H5Dclose(dataset);
  }
  H5Sclose(space);
  H5Pclose(creation);
}

void write_input(const std::string& path, const Layout& layout, Random& random) {
  const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  if (layout.newest) { H5Pset_libver_bounds(access, H5F_LIBVER_LATEST, H5F_LIBVER_LATEST); }
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, access);
  REQUIRE(file >= 0);
  write_dataset(file, "q", layout, layout.q, random);
  write_dataset(file, "k", layout, layout.kv, random);
  write_dataset(file, "v", layout, layout.kv, random);
  const hid_t scalar = H5Screate(H5S_SCALAR);
  const double scale = 0.5;
  const hid_t attribute = H5Acreate2(file, "scale", H5T_IEEE_F64LE, scalar, H5P_DEFAULT, H5P_DEFAULT);
  H5Awrite(attribute, H5T_NATIVE_DOUBLE, &scale);
  H5Aclose(attribute);
  H5Sclose(scalar);
  H5Fclose(file);
  H5Pclose(access);
}

void chunk(hid_t creation, const Shape& shape) {
  Shape extents = shape;
  extents[extents.size() - 3] = std::min<hsize_t>(5, extents[extents.size() - 3]);
  extents[extents.size() - 2] = 1;
  H5Pset_chunk(creation, static_cast<int>(extents.size()), extents.data());
}

/// Valid files of every storage that HDF5 has, to be damaged.
std::vector<std::string> write_bases(const TemporaryFolder& folder, Random& random) {
  const Shape q{2, 12, 2, 4};
  const Shape kv{2, 12, 1, 4};
  const hid_t fp16 = half_type(5);
  const hid_t bf16 = half_type(8);
  std::vector<Layout> layouts;
  for (const bool newest : {false, true}) {
    layouts.push_back({newest, H5T_IEEE_F32LE, q, kv, {}, false});
    layouts.push_back({newest, bf16, {9, 2, 4}, {9, 2, 4}, {}, false});
    layouts.push_back({newest, fp16, q, kv, [](hid_t creation, const Shape&) { H5Pset_layout(creation, H5D_COMPACT); }, false});
    layouts.push_back({newest, H5T_IEEE_F32BE, q, kv, chunk, false});
    layouts.push_back({newest, fp16, q, kv,
                       [](hid_t creation, const Shape& shape) {
                         chunk(creation, shape);
                         H5Pset_shuffle(creation);
                         H5Pset_deflate(creation, 6);
                       },
                       false});
    layouts.push_back({newest, H5T_IEEE_F32LE, q, kv,
                       [](hid_t creation, const Shape& shape) {
                         chunk(creation, shape);
                         H5Pset_fletcher32(creation);
                       },
                       true});
    layouts.push_back({newest, H5T_IEEE_F32LE, q, kv,
                       [](hid_t creation, const Shape& shape) {
                         chunk(creation, shape);
                         H5Pset_nbit(creation);
                       },
                       false});
  }
  std::vector<std::string> bases;
  for (const Layout& layout : layouts) {
    bases.push_back(folder / ("base-" + std::to_string(bases.size()) + ".h5"));
    write_input(bases.back(), layout, random);
  }
  // A virtual dataset of two of the parts that lie there.
  const std::string path = folder / "base-virtual.h5";
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  for (const char* name : {"q", "k", "v"}) {
    const Shape own = name[0] == 'q' ? q : kv;
    const hid_t creation = H5Pcreate(H5P_DATASET_CREATE);
    const hid_t space = H5Screate_simple(4, own.data(), nullptr);
    for (const hsize_t batch : {0, 1}) {
      const Shape start{batch, 0, 0, 0};
      const Shape count{1, own[1], own[2], own[3]};
      const hid_t source = H5Screate_simple(4, own.data(), nullptr);
      H5Sselect_hyperslab(source, H5S_SELECT_SET, start.data(), nullptr, count.data(), nullptr);
      H5Sselect_hyperslab(space, H5S_SELECT_SET, start.data(), nullptr, count.data(), nullptr);
      H5Pset_virtual(creation, space, batch == 0 ? "base-0.h5" : "base-7.h5", name, source);
      H5Sclose(source);
    }
    H5Sselect_all(space);
    H5Dclose(H5Dcreate2(file, name, H5T_IEEE_F32LE, space, H5P_DEFAULT, creation, H5P_DEFAULT));
    H5Sclose(space);
    H5Pclose(creation);
  }
  H5Fclose(file);
  bases.push_back(path);
  H5Tclose(fp16);
  H5Tclose(bf16);
  return bases;
}

/// A file of types and shapes that may or may not fit.
void write_odd(const std::string& path, Random& random) {
  const hid_t fp16 = half_type(5);
  const hid_t odd = half_type(6);
  const std::array<hid_t, 8> types{H5T_IEEE_F32LE, H5T_IEEE_F32BE, H5T_IEEE_F64LE, H5T_STD_I16LE, H5T_STD_U8LE, fp16, odd, H5T_STD_I32BE};
  const auto extent = [&] { return below(random, 12) == 0 ? hsize_t{0} : 1 + below(random, 9); };
  Layout layout;
  layout.newest = below(random, 2) == 0;
  layout.type = types[below(random, 2) == 0 ? 0 : below(random, types.size())];
  for (std::uint64_t rank = below(random, 8) == 0 ? 3 + below(random, 3) : 4; rank > 0; --rank) { layout.q.push_back(extent()); }
  layout.kv = layout.q;
  if (below(random, 3) == 0) { layout.kv[below(random, layout.kv.size())] = extent(); }
  if (below(random, 2) == 0) {
    layout.prepare = [&](hid_t creation, const Shape& shape) {
      Shape extents = shape;
      for (hsize_t& length : extents) { length = 1 + below(random, std::max<hsize_t>(1, length)); }
      H5Pset_chunk(creation, static_cast<int>(extents.size()), extents.data());
      if (below(random, 2) == 0) { H5Pset_deflate(creation, 3); }
    };
  }
  write_input(path, layout, random);
  H5Tclose(fp16);
  H5Tclose(odd);
}

/// A dataset read whole by one call, widened to fp32 by HDF5.
std::vector<float> read_whole(hid_t file, const char* name, Shape& shape) {
  const hid_t dataset = H5Dopen2(file, name, H5P_DEFAULT);
  if (dataset < 0) { return {}; }
  const hid_t space = H5Dget_space(dataset);
  shape.resize(static_cast<std::size_t>(std::max(0, H5Sget_simple_extent_ndims(space))));
  H5Sget_simple_extent_dims(space, shape.data(), nullptr);
  std::vector<float> values(static_cast<std::size_t>(std::max<hssize_t>(0, H5Sget_simple_extent_npoints(space))));
  if (H5Dread(dataset, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) < 0) { return {}; }
  return values;
}

enum Verdict : int { same = 0, different = 1, beyond_comparison = 2 };

/// Attention of the input in fp64 beside /o of the result.
Verdict compare(const std::string& input, const std::string& result) {
  const hid_t file = H5Fopen(input.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  const hid_t answer = H5Fopen(result.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT);
  if (file < 0 || answer < 0) { return different; }
  Shape shape;
  Shape kv_shape;
  Shape out_shape;
  const std::vector<float> q = read_whole(file, "q", shape);
  const std::vector<float> k = read_whole(file, "k", kv_shape);
  const std::vector<float> v = read_whole(file, "v", kv_shape);
  const std::vector<float> o = read_whole(answer, "o", out_shape);
  if (q.empty() || k.empty() || v.size() != k.size() || o.size() != q.size()) { return different; }
  double scale = 1.0 / std::sqrt(static_cast<double>(shape.back()));
  if (H5Aexists(file, "scale") > 0) { H5Aread(H5Aopen(file, "scale", H5P_DEFAULT), H5T_NATIVE_DOUBLE, &scale); }
  const std::size_t rank = shape.size();
  const std::size_t batches = rank == 4 ? shape[0] : 1;
  const std::size_t rows = shape[rank - 3];
  const std::size_t heads = shape[rank - 2];
  const std::size_t kv_heads = kv_shape[rank - 2];
  const std::size_t dim = shape[rank - 1];
  for (std::size_t batch = 0; batch < batches; ++batch) {
    for (std::size_t head = 0; head < heads; ++head) {
      const auto key = [&](std::size_t row) { return ((batch * rows + row) * kv_heads + head * kv_heads / heads) * dim; };
      for (std::size_t row = 0; row < rows; ++row) {
        const std::size_t query = ((batch * rows + row) * heads + head) * dim;
        std::vector<double> scores(rows);
        double largest_value = 0;
        for (std::size_t other = 0; other < rows; ++other) {
          for (std::size_t d = 0; d < dim; ++d) {
            scores[other] += scale * static_cast<double>(q[query + d]) * static_cast<double>(k[key(other) + d]);
            largest_value = std::max(largest_value, std::abs(static_cast<double>(v[key(other) + d])));
          }
          // fp32 cannot be expected to agree on scores or sums of such size, nor on values it loses.
          if (!(std::abs(scores[other]) < 1e3)) { return beyond_comparison; }
        }
        if (!(largest_value < 1e4)) { return beyond_comparison; }
        const double top = *std::max_element(scores.begin(), scores.end());
        double sum = 0;
        for (double& score : scores) { sum += score = std::exp(score - top); }
        for (std::size_t d = 0; d < dim; ++d) {
          double expected = 0;
          for (std::size_t other = 0; other < rows; ++other) { expected += scores[other] / sum * static_cast<double>(v[key(other) + d]); }
          // Rounded to bf16 at the coarsest; what is looked for are values of another place.
          if (!(std::abs(expected - static_cast<double>(o[query + d])) <= 0.01 * largest_value + 1e-30)) { return different; }
        }
      }
    }
  }
  return same;
}

/// compare() in a process of its own, since HDF5 reads the damaged file; the exit status, or 128 + the signal that ended it.
int compare_apart(const std::string& input, const std::string& result) {
  const pid_t child = fork();
  if (child == 0) {
    const rlimit cpu{10, 10};
    const rlimit core{0, 0};
    setrlimit(RLIMIT_CPU, &cpu);
    setrlimit(RLIMIT_CORE, &core);
    _exit(compare(input, result));
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/// Whether the run ended as a refusal or a result, with one line where it refused.
bool ended_well(const ProcessResult& result) {
  const bool told = result.exit_code != 2 || std::count(result.err.begin(), result.err.end(), '\n') == 1;
  return !result.timed_out && told && (result.exit_code == 0 || result.exit_code == 1 || result.exit_code == 2);
}

std::string kept(const std::string& path, std::int64_t number) {
  const std::string copy = (std::filesystem::temp_directory_path() / ("annulus-fuzz-" + std::to_string(number))).string();
  std::filesystem::copy_file(path, copy, std::filesystem::copy_options::overwrite_existing);
  return copy;
}

const std::int64_t kCases = asked_for("ANNULUS_FUZZ_CASES", 2000);
const auto kSeed = static_cast<std::uint64_t>(asked_for("ANNULUS_FUZZ_SEED", 1));

}  // namespace

TEST_CASE("damaged and odd HDF5 inputs are refused, or give what another reading of the file gives") {
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);  // odd shapes that HDF5 itself refuses are part of it
  const TemporaryFolder folder;
  Random random(kSeed);
  const std::vector<std::string> bases = write_bases(folder, random);
  for (const std::string& base : bases) {
    INFO(base);
    const ProcessResult whole =
        run_process({ANNULUS_PROGRAM, "run", "--threads", "1", "--input", base, "--output", folder / "o.h5", "--force"}, 60);
    INFO(whole.err);
    REQUIRE(whole.exit_code == 0);
    REQUIRE(compare_apart(base, folder / "o.h5") == same);
  }
  std::map<std::string, std::int64_t> counts;
  double slowest_s = 0;
  const std::int64_t cases = kCases * 7 / 10;
  for (std::int64_t number = 0; number < cases; ++number) {
    Random own(kSeed * 1000003 + static_cast<std::uint64_t>(number));
    const std::string input = folder / "case.h5";
    if (number % 8 == 7) {
      write_odd(input, own);
    } else {
      std::string bytes = read_bytes(bases[below(own, bases.size())]);
      mutate(bytes, own);
      write_bytes(input, bytes);
    }
    const std::string output = folder / "o.h5";
    std::filesystem::remove(output);
    const ProcessResult result = run_process({ANNULUS_PROGRAM, "run", "--threads", "1", "--input", input, "--output", output}, 60);
    slowest_s = std::max(slowest_s, result.seconds);
    if (!ended_well(result)) {
      FAIL_CHECK("seed " << kSeed << " case " << number << " (" << kept(input, number) << "): exit " << result.exit_code << " after "
                         << result.seconds << " s: " << result.err);
    }
    ++counts["exit " + std::to_string(result.exit_code)];
    for (const char* mark : {"crashes on it", "does not come to an end"}) {
      if (result.err.find(mark) != std::string::npos) { ++counts[mark]; }
    }
    if (result.exit_code != 0) { continue; }
    const int verdict = compare_apart(input, output);
    if (verdict != same && verdict != beyond_comparison) {
      FAIL_CHECK("seed " << kSeed << " case " << number << " (" << kept(input, number) << "): another reading gives another answer ("
                         << verdict << ")");
    }
    ++counts[verdict == same ? "same numbers" : "beyond comparison"];
  }
  std::printf("%lld HDF5 files, seed %llu:", static_cast<long long>(cases), static_cast<unsigned long long>(kSeed));
  for (const auto& [what, count] : counts) { std::printf(" %s %lld,", what.c_str(), static_cast<long long>(count)); }
  std::printf(" slowest %.2f s\n", slowest_s);
  CHECK(counts["exit 2"] > cases / 10);
  CHECK(counts["same numbers"] > cases / 10);
}

TEST_CASE("damaged configurations are refused, or mean what they say") {
  const TemporaryFolder folder;
  const std::string base =
      "# a configuration\nbatch = 2\nseq-len = 4096\nheads = 8\nkv-heads = 4\nhead-dim = 64\ndtype = \"bf16\"\ncausal = true\nscale = "
      "0.125\n"
      "segment-lengths = [512, 1024]\ndilation-rates = [1, 2]\nmixing = \"lse\"\noffset = \"head\"\nseed = 7\nthreads = 3\ntimeout = "
      "20.0\n";
  const std::vector<std::string> pieces{"99999999999999999999",
                                        "-1",
                                        "0x7f",
                                        "1e9",
                                        "nan",
                                        "\"",
                                        "'''",
                                        "[",
                                        "]",
                                        "{",
                                        "=",
                                        "\n",
                                        "[a.b]\n",
                                        "seq-len = 5\n",
                                        "true",
                                        "\xff\xfe",
                                        std::string(1, '\0'),
                                        "1979-05-27",
                                        "_",
                                        "#",
                                        "\\u0000",
                                        "inf"};
  std::map<int, std::int64_t> counts;
  const std::int64_t cases = kCases - kCases * 7 / 10;
  for (std::int64_t number = 0; number < cases; ++number) {
    Random own(kSeed * 7000003 + static_cast<std::uint64_t>(number));
    std::string text = base;
    const std::uint64_t way = below(own, 3);
    if (way == 0) {
      mutate(text, own);
    } else if (way == 1) {
      // Another value for a key.
      std::size_t begin = text.find("= ", below(own, text.size() - 20));
      begin = begin == std::string::npos ? text.find("= ") + 2 : begin + 2;
      const std::array<std::string, 9> values{"1", "2", "16", "64", "true", "false", "0.5", "\"fp32\"", "[8, 16]"};
      text.replace(begin, text.find('\n', begin) - begin, values[below(own, values.size())]);
    } else {
      for (std::uint64_t edits = 1 + below(own, 3); edits > 0; --edits) {
        text.replace(below(own, text.size()), below(own, 8), pieces[below(own, pieces.size())]);
      }
    }
    const std::string path = folder / "case.toml";
    write_bytes(path, text);
    const ProcessResult result = run_process({ANNULUS_PROGRAM, "run", "--config", path, "--print-config"}, 60);
    ++counts[result.exit_code];
    if (!ended_well(result)) {
      FAIL_CHECK("seed " << kSeed << " case " << number << " (" << kept(path, number) << "): exit " << result.exit_code << ": "
                         << result.err);
    }
    if (result.exit_code != 0) { continue; }
    // Another reading: every plain line `key = integer` of the text is a line of what is printed; the two floats read integers too.
    std::istringstream lines(text);
    for (std::string line; std::getline(lines, line);) {
      const std::size_t equals = line.find(" = ");
      if (line.starts_with("scale") || line.starts_with("timeout")) { continue; }
      const bool plain = equals != std::string::npos && line.find_first_not_of("abcdefghijklmnopqrstuvwxyz-") == equals &&
                         line.size() > equals + 3 && line.find_first_not_of("0123456789", equals + 3) == std::string::npos;
      if (plain && result.out.find(line + "\n") == std::string::npos) {
        FAIL_CHECK("seed " << kSeed << " case " << number << " (" << kept(path, number) << "): '" << line << "' is not in\n" << result.out);
      }
    }
    write_bytes(path, result.out);
    if (run_process({ANNULUS_PROGRAM, "run", "--config", path, "--print-config"}, 60).out != result.out) {
      FAIL_CHECK("seed " << kSeed << " case " << number << ": what is printed does not read back to the same");
    }
  }
  std::printf("%lld configurations, seed %llu:", static_cast<long long>(cases), static_cast<unsigned long long>(kSeed));
  for (const auto& [code, count] : counts) { std::printf(" exit %d %lld,", code, static_cast<long long>(count)); }
  std::printf("\n");
  CHECK(counts[0] > cases / 20);
  CHECK(counts[2] > cases / 2);
}
