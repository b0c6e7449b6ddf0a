// SPDX-License-Identifier: Apache-2.0
// slurm/run.sbatch without Slurm: launchers of the same names say how they were called.
#include <annulus_test.hpp>

#include "app/process.hpp"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <signal.h>
#include <string>
#include <unistd.h>
#include <vector>

using namespace annulus::test;

namespace {

std::string read_text(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_program(const std::string& path, const std::string& text) {
  std::ofstream(path) << "#!/bin/bash\n" << text;
  std::filesystem::permissions(path, std::filesystem::perms::owner_all);
}

/// What `srun --mpi=list` prints.
constexpr const char* kWithPmix = "MPI plugin types are...\n\tnone\n\tpmix\nspecific pmix plugin versions available: pmix_v4\n";
constexpr const char* kWithoutPmix = "MPI plugin types are...\n\tnone\n\tpmi2\n";

/// A folder that jobs are submitted from, with a config file, and launchers first in PATH. They print what they were given and what they
/// see of GPUs and threads, and end with $LAUNCHER_EXIT. No variable of a job around this test reaches the script.
class Submission {
 public:
  Submission() {
    const std::string launcher =
        "if [[ ${1:-} == --mpi=list ]]; then cat \"$MPI_LIST\" >&2; exit 0; fi\n"
        "echo \"$(basename \"$0\") $*\"\n"
        "env | grep -E '^(SLURM_.*(BIND|GPU|TRES)|OMP_|OMPI_)' | sort\n"
        "if [[ -n ${WAIT_FOR_SIGNAL:-} ]]; then\n"
        "  trap 'echo got TERM; exit 7' TERM\n"
        "  echo waiting >started\n"
        "  while true; do sleep 0.05; done\n"
        "fi\n"
        "exit \"${LAUNCHER_EXIT:-0}\"\n";
    std::filesystem::create_directory(folder_ / "bin");
    write_program(folder_ / "bin/srun", launcher);
    write_program(folder_ / "bin/mpirun", launcher);
    std::ofstream(folder_ / "list") << kWithPmix;
    std::ofstream(folder_ / "job.toml") << "seq-len = 64\nheads = 2\nhead-dim = 8\n";
    for (char** entry = environ; *entry != nullptr; ++entry) {
      const std::string name = std::string(*entry).substr(0, std::string(*entry).find('='));
      if (name.starts_with("SLURM_") || name.starts_with("OMPI_") || name.starts_with("OMP_")) { environment_.push_back(name); }
    }
    environment_.insert(environment_.end(),
                        {"LAUNCHER", "PATH=" + (folder_ / "bin") + ":" + std::getenv("PATH"), std::string("ANNULUS=") + ANNULUS_PROGRAM,
                         "MPI_LIST=" + (folder_ / "list"), "SLURM_JOB_ID=77", "SLURM_SUBMIT_DIR=" + folder_.path()});
  }

  std::string operator/(const std::string& name) const { return folder_ / name; }

  ProcessResult run(const std::vector<std::string>& arguments, const std::vector<std::string>& more_environment,
                    const std::function<void(pid_t)>& meanwhile = {}) const {
    std::vector<std::string> command{"/bin/bash", ANNULUS_RUN_SBATCH};
    command.insert(command.end(), arguments.begin(), arguments.end());
    std::vector<std::string> environment = environment_;
    environment.insert(environment.end(), more_environment.begin(), more_environment.end());
    return run_process(command, 60, environment, meanwhile);
  }

 private:
  TemporaryFolder folder_;
  std::vector<std::string> environment_;
};

/// Two nodes of eight GPUs, as Slurm describes them in a job's environment.
const std::vector<std::string> kTwoNodes{"SLURM_NTASKS=16", "SLURM_TASKS_PER_NODE=8(x2)", "SLURM_CPUS_PER_TASK=12", "SLURM_GPUS_ON_NODE=8",
                                         "SLURM_JOB_NODELIST=gpu[01-02]"};

std::vector<std::string> with(std::vector<std::string> environment, const std::vector<std::string>& more) {
  environment.insert(environment.end(), more.begin(), more.end());
  return environment;
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

const std::string kRun = std::string(" ") + ANNULUS_PROGRAM + " run --config job.toml";

}  // namespace

TEST_CASE("srun starts the program with PMIx and the job's cores, and passes all flags on") {
  const Submission submission;

  const ProcessResult result = submission.run({"job.toml", "--backend", "cpu", "--causal"}, with(kTwoNodes, {"LAUNCHER=srun"}));

  INFO(result.out << result.err);
  CHECK(result.exit_code == 0);
  CHECK(result.out == "srun --mpi=pmix --cpus-per-task=12 --distribution=block:block --kill-on-bad-exit=1" + kRun +
                          " --backend cpu --causal --output annulus-77.h5\nSLURM_GPUS_ON_NODE=8\n");
  CHECK_THAT(result.err, contains_text("job 77 on gpu[01-02], ranks: 16"));
}

TEST_CASE("ranks and mpirun's daemons see all GPUs of their node whatever sbatch was told") {
  const Submission submission;
  const std::vector<std::vector<std::string>> wishes{
      {"SLURM_GPUS_PER_TASK=1"},
      {"SLURM_TRES_PER_TASK=cpu=12,gres/gpu=1", "SLURM_TRES_BIND=gres/gpu:per_task:1"},
  };
  for (const std::string launcher : {"srun", "mpirun"}) {
    for (const std::vector<std::string>& wish : wishes) {
      const ProcessResult result = submission.run({"job.toml"}, with(with(kTwoNodes, wish), {"LAUNCHER=" + launcher}));

      INFO(launcher << " " << wish.front() << "\n" << result.out << result.err);
      CHECK(result.exit_code == 0);
      CHECK(result.out.find("--gpu") == std::string::npos);
      CHECK_THAT(result.out, contains_text("SLURM_GPUS_ON_NODE=8\nSLURM_GPUS_PER_NODE=8\n"));
      CHECK(result.out.find("_TASK=") == std::string::npos);
      CHECK(result.out.find("_BIND=") == std::string::npos);
    }

    const ProcessResult bound =
        submission.run({"job.toml"}, with(kTwoNodes, {"LAUNCHER=" + launcher, "SLURM_NTASKS_PER_GPU=1", "SLURM_GPU_BIND=single:1"}));

    INFO(launcher << "\n" << bound.out << bound.err);
    CHECK_THAT(bound.out, contains_text("\nSLURM_GPUS_ON_NODE=8\n"));
    CHECK(bound.out.find("_PER_GPU=") == std::string::npos);
    CHECK(bound.out.find("_BIND=") == std::string::npos);
    CHECK(bound.out.find("_PER_NODE=") == std::string::npos);
  }
}

TEST_CASE("srun keeps an MPI plugin and a distribution that the user has chosen") {
  const Submission submission;

  const ProcessResult result =
      submission.run({"job.toml"}, with(kTwoNodes, {"SLURM_MPI_TYPE=pmix_v4", "SLURM_DISTRIBUTION=cyclic", "MPI_LIST=/dev/null"}));

  INFO(result.out << result.err);
  CHECK_THAT(result.out, Catch::Matchers::StartsWith("srun --mpi=pmix_v4 --cpus-per-task=12 --distribution=cyclic "));
}

TEST_CASE("mpirun puts the ranks of a node on cores of their own") {
  const Submission submission;

  const ProcessResult result =
      submission.run({"job.toml"}, {"LAUNCHER=mpirun", "SLURM_NTASKS=3", "SLURM_TASKS_PER_NODE=1(x3)", "SLURM_CPUS_PER_TASK=1"});

  INFO(result.out << result.err);
  CHECK(result.exit_code == 0);
  CHECK(first_line(result.out) == "mpirun -n 3 --map-by ppr:1:node:PE=1 --bind-to core" + kRun + " --output annulus-77.h5");
}

TEST_CASE("mpirun asks for no more cores than the node has") {
  const Submission submission;

  const ProcessResult threads = submission.run({"job.toml"}, {"LAUNCHER=mpirun", "SLURM_CPUS_PER_TASK=100000"});
  const ProcessResult ranks =
      submission.run({"job.toml"}, {"LAUNCHER=mpirun", "SLURM_NTASKS=100000", "SLURM_TASKS_PER_NODE=100000", "SLURM_CPUS_PER_TASK=1"});

  INFO(threads.out << threads.err << ranks.out << ranks.err);
  CHECK_THAT(threads.out, Catch::Matchers::StartsWith("mpirun -n 1 --map-by ppr:1:node:PE="));
  CHECK(threads.out.find("100000") == std::string::npos);
  CHECK(threads.out.find("PE=0") == std::string::npos);
  CHECK_THAT(ranks.out, Catch::Matchers::StartsWith("mpirun -n 100000 --map-by ppr:100000:node --bind-to none "));
}

TEST_CASE("mpirun follows Slurm's slots where nodes have different numbers of ranks") {
  const Submission submission;

  const ProcessResult result =
      submission.run({"job.toml"}, {"LAUNCHER=mpirun", "SLURM_NTASKS=6", "SLURM_TASKS_PER_NODE=4,2", "SLURM_CPUS_PER_TASK=3"});

  INFO(result.out << result.err);
  CHECK_THAT(result.out, Catch::Matchers::StartsWith("mpirun -n 6 --map-by slot:PE=3 --bind-to core "));
}

TEST_CASE("a job that names no cpus-per-task shares the node's cores among its ranks") {
  const Submission submission;

  const ProcessResult result =
      submission.run({"job.toml"}, {"LAUNCHER=srun", "SLURM_NTASKS=4", "SLURM_TASKS_PER_NODE=4", "SLURM_CPUS_ON_NODE=64"});
  const ProcessResult crowded =
      submission.run({"job.toml"}, {"LAUNCHER=srun", "SLURM_NTASKS=4", "SLURM_TASKS_PER_NODE=4", "SLURM_CPUS_ON_NODE=2"});
  const ProcessResult nothing = submission.run({"job.toml"}, {"LAUNCHER=srun"});

  INFO(result.out << result.err << crowded.out << crowded.err << nothing.out << nothing.err);
  CHECK_THAT(result.out, contains_text(" --cpus-per-task=16 "));
  CHECK_THAT(crowded.out, contains_text(" --cpus-per-task=1 "));
  CHECK_THAT(nothing.out, contains_text(" --cpus-per-task=1 "));
}

TEST_CASE("the launcher is srun where Slurm offers PMIx, else mpirun") {
  const Submission submission;
  std::ofstream(submission / "other") << kWithoutPmix;

  const ProcessResult with_pmix = submission.run({"job.toml"}, {});
  const ProcessResult without_pmix = submission.run({"job.toml"}, {"MPI_LIST=" + (submission / "other")});

  INFO(with_pmix.err << without_pmix.err);
  CHECK_THAT(with_pmix.out, Catch::Matchers::StartsWith("srun "));
  CHECK_THAT(without_pmix.out, Catch::Matchers::StartsWith("mpirun "));
}

TEST_CASE("the exit code of the job is the launcher's") {
  const Submission submission;
  for (const std::string launcher : {"srun", "mpirun"}) {
    for (const int code : {0, 1, 2, 3, 137}) {
      const ProcessResult result = submission.run({"job.toml"}, {"LAUNCHER=" + launcher, "LAUNCHER_EXIT=" + std::to_string(code)});

      INFO(launcher << "\n" << result.err);
      CHECK(result.exit_code == code);
    }
  }
}

TEST_CASE("a signal for the job reaches the launcher") {
  const Submission submission;
  for (const std::string launcher : {"srun", "mpirun"}) {
    std::filesystem::remove(submission / "started");
    bool sent = false;

    const ProcessResult result = submission.run({"job.toml"}, {"LAUNCHER=" + launcher, "WAIT_FOR_SIGNAL=1"}, [&](pid_t job) {
      if (!sent && read_text(submission / "started") == "waiting\n") { sent = kill(job, SIGTERM) == 0; }
    });

    INFO(launcher << "\n" << result.out << result.err);
    CHECK(result.exit_code == 7);
    CHECK_THAT(result.out, contains_text("got TERM"));
  }
}

TEST_CASE("a wrong configuration ends the job with one sentence before any rank starts") {
  const Submission submission;
  std::ofstream(submission / "wrong.toml") << "sequence = 5\n";
  const std::vector<std::vector<std::string>> wrong{
      {"wrong.toml"}, {"absent.toml"}, {"job.toml", "--dtype", "fp64"}, {"job.toml", "--none"}};
  for (const std::vector<std::string>& arguments : wrong) {
    const ProcessResult result = submission.run(arguments, with(kTwoNodes, {"LAUNCHER=srun"}));

    INFO(arguments.back() << "\n" << result.out << result.err);
    CHECK(result.exit_code == 2);
    CHECK(result.out.empty());
    CHECK_THAT(result.err, Catch::Matchers::StartsWith("annulus: "));
    CHECK(result.err.find('\n') == result.err.size() - 1);
  }
}

TEST_CASE("a result's name that flags or the configuration give is kept") {
  const Submission submission;
  std::ofstream(submission / "named.toml") << "seq-len = 64\nheads = 2\nhead-dim = 8\noutput = \"mine.h5\"\n";

  const ProcessResult flag = submission.run({"job.toml", "--output", "other.h5"}, {"LAUNCHER=srun"});
  const ProcessResult joined = submission.run({"job.toml", "--output=other.h5"}, {"LAUNCHER=srun"});
  const ProcessResult file = submission.run({"named.toml"}, {"LAUNCHER=srun"});

  INFO(flag.out << flag.err << joined.out << joined.err << file.out << file.err);
  CHECK_THAT(first_line(flag.out), Catch::Matchers::EndsWith(kRun + " --output other.h5"));
  CHECK_THAT(first_line(joined.out), Catch::Matchers::EndsWith(kRun + " --output=other.h5"));
  CHECK_THAT(first_line(file.out), Catch::Matchers::EndsWith(" run --config named.toml"));
}

TEST_CASE("what the script itself refuses has exit code 2") {
  const Submission submission;

  const ProcessResult nothing = submission.run({}, {});
  const ProcessResult flag_first = submission.run({"--causal"}, {});
  const ProcessResult launcher = submission.run({"job.toml"}, {"LAUNCHER=aprun"});
  const ProcessResult program = submission.run({"job.toml"}, {"ANNULUS=absent/annulus"});
  const ProcessResult no_program = submission.run({"job.toml"}, {"ANNULUS", "PATH=" + (submission / "bin")});

  for (const ProcessResult* result : {&nothing, &flag_first, &launcher, &program, &no_program}) {
    INFO(result->err);
    CHECK(result->exit_code == 2);
    CHECK(result->out.empty());
  }
  CHECK_THAT(nothing.err, contains_text("usage: sbatch"));
  CHECK_THAT(flag_first.err, contains_text("usage: sbatch"));
  CHECK_THAT(launcher.err, contains_text("LAUNCHER is 'aprun'; allowed are srun and mpirun"));
  CHECK_THAT(program.err, contains_text("ANNULUS is 'absent/annulus'"));
  CHECK_THAT(no_program.err, contains_text("no annulus in"));
}

TEST_CASE("sbatch reads every one of its lines") {
  const std::string script = read_text(ANNULUS_RUN_SBATCH);

  const std::size_t first_command = script.find("\nset -euo pipefail\n");

  REQUIRE(first_command != std::string::npos);
  CHECK_THAT(script, Catch::Matchers::StartsWith("#!/bin/bash\n"));
  CHECK(script.find("\n#SBATCH ") < first_command);
  CHECK(script.rfind("\n#SBATCH ") < first_command);
  // sbatch stops at the first line that is neither empty nor a comment.
  for (std::size_t begin = 0; begin < first_command; begin = script.find('\n', begin) + 1) {
    CHECK((script[begin] == '#' || script[begin] == '\n'));
  }
}
