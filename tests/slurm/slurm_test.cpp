// SPDX-License-Identifier: Apache-2.0
// The batch scripts under a real Slurm of one node, which this test starts.
#include <annulus_test.hpp>

#include "app/bench_table.hpp"
#include "app/process.hpp"
#include "io/raw_dataset.hpp"
#include "text_file.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

using namespace annulus::test;

namespace {

const std::string kScripts = ANNULUS_SLURM_SCRIPTS;

/// Seconds that anything may take on a machine that is busy with other tests.
constexpr double kPatience = 120;

bool until(const std::function<bool()>& reached, double limit_s = kPatience) {
  const auto begin = std::chrono::steady_clock::now();
  while (!reached()) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() > limit_s) { return false; }
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  return true;
}

/// Why no Slurm can be started here; empty if one can.
std::string obstacle() {
  if (::geteuid() != 0) { return "slurmctld and slurmd need root"; }
  for (const char* program : {"munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "setpriv"}) {
    if (run_process({"bash", "-c", std::string("command -v ") + program}, kPatience).exit_code != 0) {
      return std::string(program) + " is not installed (scripts/install_dependencies --tests)";
    }
  }
  return {};
}

/// The Slurm of this test, as long as it lives.
class Cluster {
 public:
  Cluster() : obstacle_(obstacle()) {
    if (!obstacle_.empty()) { return; }
    // No child of this process: who kills a test that takes too long kills its children, and nobody would stop the daemons.
    const std::string command = std::string("setsid --fork ") + ANNULUS_SLURM_CLUSTER + " " + folder_.path() + " >" + log() + " 2>&1";
    control_ = ::popen(command.c_str(), "we");
    if (control_ == nullptr) {
      obstacle_ = "popen failed";
      return;
    }
    until([&] { return exists("ready") || exists("stopped"); });
    if (!exists("ready")) { obstacle_ = "Slurm does not come up here:\n" + read_text(log()); }
  }
  ~Cluster() {
    if (control_ == nullptr) { return; }
    ::pclose(control_);
    until([&] { return exists("stopped"); });
  }
  Cluster(const Cluster&) = delete;
  Cluster& operator=(const Cluster&) = delete;

  /// Why it does not run; empty if it does.
  const std::string& why_not() const { return obstacle_; }

  /// Where slurmd keeps what it has of running jobs.
  std::string spool() const { return folder_ / "spool"; }
  /// What its daemons said last.
  std::string last_words() const { return run_process({"bash", "-c", "tail --lines=15 " + folder_.path() + "/slurm*.log"}, kPatience).out; }

  /// Environment of commands that talk to it, which knows nothing of a job around this test.
  std::vector<std::string> environment() const {
    std::vector<std::string> entries;
    for (char** entry = environ; *entry != nullptr; ++entry) {
      const std::string name = std::string(*entry).substr(0, std::string(*entry).find('='));
      for (const char* foreign : {"SLURM_", "SBATCH_", "OMPI_", "PMIX_", "PMI_", "ANNULUS_"}) {
        if (name.starts_with(foreign)) { entries.push_back(name); }
      }
    }
    // The last two as scripts/launch does: in containers processes may not read each other's memory, and here there are more of them than
    // cores.
    entries.insert(entries.end(), {"LAUNCHER", "SLURM_CONF=" + folder_ / "slurm.conf", std::string("ANNULUS=") + ANNULUS_PROGRAM,
                                   "OMPI_MCA_btl_vader_single_copy_mechanism=none", "OMPI_MCA_mpi_yield_when_idle=1"});
    return entries;
  }

  /// srun where this Slurm has PMIx, and mpirun.
  std::vector<std::string> launchers() const {
    const ProcessResult types = run_process({"srun", "--mpi=list"}, kPatience, environment());
    if ((types.out + types.err).find("pmix") == std::string::npos) { return {"mpirun"}; }
    return {"srun", "mpirun"};
  }

 private:
  std::string log() const { return folder_ / "cluster.log"; }
  bool exists(const std::string& name) const { return std::filesystem::exists(folder_ / name); }

  TemporaryFolder folder_;
  std::string obstacle_;
  std::FILE* control_ = nullptr;
};

/// Null where there can be none; then the case is skipped.
const Cluster* cluster() {
  static const Cluster one;
  if (one.why_not().empty()) { return &one; }
  skip(one.why_not());
  return nullptr;
}

/// A folder that jobs are submitted from.
class Submission {
 public:
  explicit Submission(const Cluster& cluster) : cluster_(cluster), environment_(cluster.environment()) {
    std::ofstream(folder_ / "job.toml") << "seq-len = 600\nheads = 2\nhead-dim = 16\nthreads = 1\n";
  }

  const TemporaryFolder& folder() const { return folder_; }

  ProcessResult run(const std::string& line) const {
    return run_process({"bash", "-c", "cd '" + folder_.path() + "' && " + line}, kPatience, environment_);
  }

  /// Submits a script on two ranks; the job's number.
  std::string submit(const std::string& options, const std::string& script, const std::string& arguments,
                     const std::string& launcher) const {
    const ProcessResult result =
        run("LAUNCHER=" + launcher + " sbatch --parsable --ntasks-per-node=2 --cpus-per-task=1 --output=%x-%j.out " + options + " " +
            kScripts + "/" + script + " " + arguments);
    INFO(result.err);
    REQUIRE(result.exit_code == 0);
    return result.out.substr(0, result.out.find('\n'));
  }

  /// One word of `scontrol show job`: "JobState".
  std::string fact(const std::string& job, const std::string& name) const {
    const std::string text = run("scontrol show job " + job + " | tr ' ' '\\n' | sed -n 's/^" + name + "=//p' | head -n 1").out;
    return text.substr(0, text.find('\n'));
  }

  bool has_ended(const std::string& job) const {
    const std::string state = fact(job, "JobState");
    const std::vector<std::string> ends{"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"};
    return std::find(ends.begin(), ends.end(), state) != ends.end();
  }

  /// Waits for the end of a job: its state and exit code, "COMPLETED 0:0".
  std::string end_of(const std::string& job) const {
    until([&] { return has_ended(job); });
    return fact(job, "JobState") + " " + fact(job, "ExitCode");
  }

  /// Slurm lets two minutes pass before it starts a job again; a test waits no longer than until nothing is left of the steps before,
  /// whose names the new ones will have, and until another second has begun: a job that starts in the second in which it ended
  /// is taken for the one that ended ("Job credential revoked").
  bool start_again(const std::string& job) const {
    const auto is_clean = [&] {
      // Sockets "<node>_<job>.<step>", folders "pmix.<job>.<step>".
      const auto is_of_job = [&](const auto& entry) {
        const std::string name = entry.path().filename().string();
        return name.find("." + job + ".") != std::string::npos || name.find("_" + job + ".") != std::string::npos;
      };
      const std::filesystem::directory_iterator spool(cluster_.spool());
      return std::none_of(begin(spool), end(spool), is_of_job);
    };
    const auto is_started = [&] {
      // While it is still completing it takes no new time.
      if (fact(job, "JobState") == "PENDING") { run("scontrol update jobid=" + job + " starttime=now"); }
      return fact(job, "JobState") == "RUNNING" || has_ended(job);
    };
    if (!until(is_clean)) { return false; }
    std::this_thread::sleep_for(std::chrono::milliseconds(1200));
    return until(is_started);
  }

  std::ptrdiff_t lines_in(const std::string& name) const {
    const std::string text = read_text(folder_ / name);
    return std::count(text.begin(), text.end(), '\n');
  }

 private:
  const Cluster& cluster_;
  TemporaryFolder folder_;
  std::vector<std::string> environment_;
};

/// Rows of half a second, and enough of them to be met between two.
const std::string kSweep = "job.toml --repetitions 10 --rows 4 --sweep seq-len=600..1200+100 --output rows.h5";
constexpr std::ptrdiff_t kSweepRows = 7;

/// A job that measures kSweep and is asked to stop after its first row.
struct StoppedSweep {
  std::unique_ptr<Submission> submission;
  std::string job;
  bool met = false;  ///< it had not ended by itself
};

/// Asks again where a sweep was faster than the signal.
StoppedSweep stop_sweep(const Cluster& slurm, const std::string& options, const std::string& launcher,
                        const std::function<bool(const Submission&, const std::string&)>& has_stopped) {
  StoppedSweep sweep;
  for (int tries = 0; tries < 3 && !sweep.met; ++tries) {
    sweep.submission = std::make_unique<Submission>(slurm);
    const Submission& submission = *sweep.submission;
    sweep.job = submission.submit(options, "scaling.sbatch", kSweep, launcher);
    until([&] { return submission.lines_in("rows.csv") >= 2 || submission.has_ended(sweep.job); });
    // As --signal=B:USR1@120 does before the time limit.
    submission.run("scancel --batch --signal=USR1 " + sweep.job);
    until([&] { return has_stopped(submission, sweep.job) || submission.has_ended(sweep.job); });
    sweep.met = has_stopped(submission, sweep.job);
  }
  return sweep;
}

bool was_put_back(const Submission& submission, const std::string& job) { return submission.fact(job, "Restarts") == "1"; }

}  // namespace

TEST_CASE("run.sbatch and check.sbatch compute on the ranks of a job, under all launchers") {
  const Cluster* const slurm = cluster();
  if (slurm == nullptr) { return; }
  const Submission submission(*slurm);
  for (const std::string& launcher : slurm->launchers()) {
    const std::string run = submission.submit("", "run.sbatch", "job.toml", launcher);
    const std::string check = submission.submit("", "check.sbatch", "job.toml --causal", launcher);

    const std::string run_end = submission.end_of(run);
    const std::string check_end = submission.end_of(check);

    const std::string report = read_text(submission.folder() / "annulus-" + run + ".out");
    const std::string verdict = read_text(submission.folder() / "annulus-check-" + check + ".out");
    INFO(launcher << "\n" << report << verdict << slurm->last_words());
    REQUIRE(run_end == "COMPLETED 0:0");
    CHECK_THAT(report, contains_text("run.sbatch: job " + run + " on "));
    CHECK_THAT(report, contains_text("+ " + launcher + " "));
    CHECK_THAT(report, contains_text("2 ranks over mpi"));
    CHECK(RawDataset(submission.folder() / "annulus-" + run + ".h5", "/o").extents.size() == 4);
    CHECK(check_end == "COMPLETED 0:0");
    CHECK_THAT(verdict, contains_text("PASS configured problem"));
  }
}

TEST_CASE("the tasks of an array have their number in their flags and in the name of their result") {
  const Cluster* const slurm = cluster();
  if (slurm == nullptr) { return; }
  const Submission submission(*slurm);

  const std::string job = submission.submit("--array=1-2", "run.sbatch", "job.toml --seed 4%a", slurm->launchers().front());

  const std::string first = submission.folder() / "annulus-" + job + "_1.h5";
  const std::string second = submission.folder() / "annulus-" + job + "_2.h5";
  REQUIRE(submission.end_of(job + "_1") == "COMPLETED 0:0");
  REQUIRE(submission.end_of(job + "_2") == "COMPLETED 0:0");
  CHECK_THAT(std::string(RawDataset(first, "/provenance/config").as<char>()), contains_text("seed = 41\n"));
  CHECK_THAT(std::string(RawDataset(second, "/provenance/config").as<char>()), contains_text("seed = 42\n"));
}

TEST_CASE("a step that finds the leavings of a killed one in its place is started as another") {
  const Cluster* const slurm = cluster();
  if (slurm == nullptr) { return; }
  if (slurm->launchers().front() != "srun") { return; }
  const Submission submission(*slurm);
  const std::string job = submission.submit("--hold", "check.sbatch", "job.toml", "srun");
  std::filesystem::create_directory(slurm->spool() + "/pmix." + job + ".0");

  submission.run("scontrol release " + job);
  const std::string end = submission.end_of(job);

  const std::string verdict = read_text(submission.folder() / "annulus-check-" + job + ".out");
  INFO(verdict << slurm->last_words());
  CHECK(end == "COMPLETED 0:0");
  CHECK_THAT(verdict, contains_text("PASS configured problem"));
}

TEST_CASE("a job that is cancelled ends and leaves no result") {
  const Cluster* const slurm = cluster();
  if (slurm == nullptr) { return; }
  for (const std::string& launcher : slurm->launchers()) {
    const Submission submission(*slurm);
    const std::string job = submission.submit("", "run.sbatch", "job.toml --seq-len 400000", launcher);
    const std::string report = "annulus-" + job + ".out";
    REQUIRE(until([&] { return submission.lines_in(report) >= 2; }));
    // Into the computation, which takes minutes; the case holds wherever it is met.
    std::this_thread::sleep_for(std::chrono::seconds(1));

    submission.run("scancel " + job);
    const std::string end = submission.end_of(job);
    const bool gone = until([&] { return submission.run("squeue --noheader --job " + job).out.empty(); });

    INFO(launcher << "\n" << read_text(submission.folder() / report) << slurm->last_words());
    CHECK_THAT(end, Catch::Matchers::StartsWith("CANCELLED"));
    CHECK(gone);
    std::vector<std::string> names = submission.folder().names();
    std::sort(names.begin(), names.end());
    CHECK(names == std::vector<std::string>{report, "job.toml"});
  }
}

TEST_CASE("a sweep that is asked to stop puts itself into the queue again, and ends with the rows of one that was not") {
  const Cluster* const slurm = cluster();
  if (slurm == nullptr) { return; }
  const Submission whole(*slurm);
  const std::string uninterrupted = whole.submit("", "scaling.sbatch", kSweep, slurm->launchers().front());
  REQUIRE(whole.end_of(uninterrupted) == "COMPLETED 0:0");
  const CsvColumns rows = lasting_columns_in(whole.folder() / "rows.csv");
  for (const std::string& launcher : slurm->launchers()) {
    const StoppedSweep sweep = stop_sweep(*slurm, "", launcher, was_put_back);
    const Submission& submission = *sweep.submission;
    REQUIRE(sweep.met);
    const std::ptrdiff_t measured = submission.lines_in("rows.csv") - 1;
    const bool started = submission.start_again(sweep.job);
    const std::string end = submission.end_of(sweep.job);

    const std::string report = read_text(submission.folder() / "annulus-bench-" + sweep.job + ".out");
    INFO(launcher << "\n" << report << slurm->last_words());
    CHECK(started);
    CHECK(measured < kSweepRows);
    REQUIRE(end == "COMPLETED 0:0");
    CHECK_THAT(report, contains_text("annulus: stopped by SIGUSR1 after "));
    CHECK_THAT(report, contains_text("is in the queue again (restart 1)"));
    CHECK_THAT(report, contains_text(std::to_string(measured) + " of " + std::to_string(kSweepRows) + " rows are in rows.h5 already"));
    CHECK(lasting_columns_in(submission.folder() / "rows.csv") == rows);
    CHECK(RawDataset(submission.folder() / "rows.h5", "/samples_ms").extents == std::vector<hsize_t>{kSweepRows, 10});
  }
}

TEST_CASE("a job that is asked to stop and may not start again says how to go on") {
  const Cluster* const slurm = cluster();
  if (slurm == nullptr) { return; }
  const auto ended_early = [](const Submission& submission, const std::string& job) {
    return submission.fact(job, "JobState") == "FAILED";
  };

  const StoppedSweep sweep = stop_sweep(*slurm, "--export=ALL,ANNULUS_RESTARTS=0", slurm->launchers().front(), ended_early);

  const std::string report = read_text(sweep.submission->folder() / "annulus-bench-" + sweep.job + ".out");
  INFO(report << slurm->last_words());
  CHECK(sweep.met);
  CHECK(sweep.submission->end_of(sweep.job) == "FAILED 4:0");
  CHECK_THAT(report, contains_text("the same command goes on"));
}

TEST_CASE("Slurm itself asks a sweep to stop before its time limit, and the sweep puts itself into the queue again") {
  const Cluster* const slurm = cluster();
  if (slurm == nullptr) { return; }
  // Slurm may send the signal up to a minute early, which makes it come when it next looks at time limits, within half a minute: also
  // before the script listens, and then the job is submitted once more.
  std::unique_ptr<Submission> submission;
  std::string job;
  for (int tries = 0; tries < 3 && (job.empty() || !was_put_back(*submission, job)); ++tries) {
    submission = std::make_unique<Submission>(*slurm);
    job =
        submission->submit("--time=1 --signal=B:USR1@55", "scaling.sbatch",
                           "job.toml --repetitions 1000000 --rows 4 --sweep seq-len=600,700 --output rows.h5", slurm->launchers().front());
    until([&] { return was_put_back(*submission, job) || submission->has_ended(job); });
  }

  const std::string report = read_text(submission->folder() / "annulus-bench-" + job + ".out");
  INFO(report << slurm->last_words());
  CHECK(was_put_back(*submission, job));
  CHECK_THAT(report, contains_text("annulus: stopped by SIGUSR1 after "));
  submission->run("scancel " + job);
}
