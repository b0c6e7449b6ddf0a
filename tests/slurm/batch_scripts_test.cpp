// SPDX-License-Identifier: Apache-2.0
// The batch scripts without Slurm: programs of the same names say how they were called.
#include <annulus_test.hpp>

#include "app/process.hpp"
#include "text_file.hpp"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <signal.h>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

using namespace annulus::test;

namespace {

const std::string kScripts = ANNULUS_SLURM_SCRIPTS;

void write_program(const std::string& path, const std::string& text) {
  std::ofstream(path) << "#!/bin/bash\n" << text;
  std::filesystem::permissions(path, std::filesystem::perms::owner_all);
}

/// What `srun --mpi=list` prints.
constexpr const char* kWithPmix = "MPI plugin types are...\n\tnone\n\tpmix\nspecific pmix plugin versions available: pmix_v4\n";
constexpr const char* kWithoutPmix = "MPI plugin types are...\n\tnone\n\tpmi2\n";

/// A folder that jobs are submitted from, with a config file, and launchers first in PATH. They print what they were given and what they
/// see of GPUs and threads, and end with $LAUNCHER_EXIT, or end with 0 before that the first $SAYS_NOTHING times. No variable of a job
/// around this test reaches the script.
class Submission {
 public:
  Submission() {
    const std::string launcher =
        "if [[ ${1:-} == --mpi=list ]]; then cat \"$MPI_LIST\" >&2; exit 0; fi\n"
        "if (($(cat silent 2>/dev/null | wc -l) < ${SAYS_NOTHING:-0})); then echo >>silent; echo 'task 0 launch failed' >&2; exit 0; fi\n"
        "echo \"$(basename \"$0\") $*\"\n"
        "env | grep -E '^(SLURM_.*(BIND|GPU|TRES)|OMP_|OMPI_)' | sort\n"
        "if [[ -n ${WAIT_FOR_SIGNAL:-} ]]; then\n"
        "  trap 'echo got TERM; exit \"$WAIT_FOR_SIGNAL\"' TERM\n"
        "  trap 'echo got USR1; exit \"$WAIT_FOR_SIGNAL\"' USR1\n"
        "  echo waiting >started\n"
        "  while true; do sleep 0.05; done\n"
        "fi\n"
        "exit \"${LAUNCHER_EXIT:-0}\"\n";
    std::filesystem::create_directory(folder_ / "bin");
    write_program(folder_ / "bin/srun", launcher);
    write_program(folder_ / "bin/mpirun", launcher);
    write_program(folder_ / "bin/scontrol", "echo \"scontrol $*\" >>asked; if [[ $1 == requeue ]]; then kill -KILL $PPID; fi\n");
    write_program(folder_ / "bin/sbatch", "echo \"Submitted $*\"\n");
    std::ofstream(folder_ / "list") << kWithPmix;
    std::ofstream(folder_ / "job.toml") << "seq-len = 64\nheads = 2\nhead-dim = 8\n";
    for (char** entry = environ; *entry != nullptr; ++entry) {
      const std::string name = std::string(*entry).substr(0, std::string(*entry).find('='));
      if (name.starts_with("SLURM_") || name.starts_with("ANNULUS_") || name.starts_with("OMPI_") || name.starts_with("OMP_")) {
        environment_.push_back(name);
      }
    }
    environment_.insert(environment_.end(),
                        {"LAUNCHER", "PATH=" + (folder_ / "bin") + ":" + std::getenv("PATH"), std::string("ANNULUS=") + ANNULUS_PROGRAM,
                         "MPI_LIST=" + (folder_ / "list"), "SLURM_JOB_ID=77", "SLURM_SUBMIT_DIR=" + folder_.path()});
  }

  std::string operator/(const std::string& name) const { return folder_ / name; }

  ProcessResult run(const std::vector<std::string>& arguments, const std::vector<std::string>& more_environment,
                    const std::function<void(pid_t)>& meanwhile = {}) const {
    return run_script("run.sbatch", arguments, more_environment, meanwhile);
  }

  ProcessResult run_script(const std::string& script, const std::vector<std::string>& arguments,
                           const std::vector<std::string>& more_environment, const std::function<void(pid_t)>& meanwhile = {}) const {
    std::vector<std::string> command{"/bin/bash", kScripts + "/" + script};
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

TEST_CASE("ranks that a launcher has not started are started once more, and a job without any fails") {
  const Submission submission;

  const ProcessResult late = submission.run({"job.toml"}, with(kTwoNodes, {"LAUNCHER=srun", "SAYS_NOTHING=2"}));
  const ProcessResult never = submission.run({"job.toml"}, with(kTwoNodes, {"LAUNCHER=srun", "SAYS_NOTHING=9"}));

  INFO(late.out << late.err << never.out << never.err);
  CHECK(late.exit_code == 0);
  CHECK_THAT(late.out, contains_text("srun --mpi=pmix "));
  CHECK_THAT(late.err, contains_text("none was started; once more (2)\n"));
  CHECK(never.exit_code == 3);
  CHECK(never.out.empty());
  CHECK_THAT(never.err, contains_text("run.sbatch: srun ended with 0 but no rank has said anything: none was started\n"));
}

TEST_CASE("a signal for the job reaches the launcher") {
  const Submission submission;
  for (const std::string launcher : {"srun", "mpirun"}) {
    for (const auto& [signal, name] : {std::pair{SIGTERM, "TERM"}, std::pair{SIGUSR1, "USR1"}}) {
      std::filesystem::remove(submission / "started");
      bool sent = false;

      const ProcessResult result = submission.run({"job.toml"}, {"LAUNCHER=" + launcher, "WAIT_FOR_SIGNAL=7"}, [&](pid_t job) {
        if (!sent && read_text(submission / "started") == "waiting\n") { sent = kill(job, signal) == 0; }
      });

      INFO(launcher << "\n" << result.out << result.err);
      CHECK(result.exit_code == 7);
      CHECK_THAT(result.out, contains_text(std::string("got ") + name));
    }
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

TEST_CASE("sbatch reads every one of their lines") {
  for (const std::string name : {"run.sbatch", "check.sbatch", "scaling.sbatch"}) {
    INFO(name);
    const std::string script = read_text(kScripts + "/" + name);

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
}

TEST_CASE("the number of an array's task is in its flags, its configuration and the name of its result") {
  const Submission submission;
  const std::vector<std::string> task{"LAUNCHER=srun", "SLURM_ARRAY_JOB_ID=70", "SLURM_ARRAY_TASK_ID=7"};
  std::ofstream(submission / "job-7.toml") << "seq-len = 64\nheads = 2\nhead-dim = 8\n";

  const ProcessResult result = submission.run({"job-%a.toml", "--seed", "1%a"}, task);
  const ProcessResult bench = submission.run_script("scaling.sbatch", {"job.toml", "--seed", "%a"}, task);

  INFO(result.out << result.err << bench.out << bench.err);
  CHECK_THAT(first_line(result.out), Catch::Matchers::EndsWith(" run --config job-7.toml --seed 17 --output annulus-70_7.h5"));
  CHECK_THAT(first_line(bench.out),
             Catch::Matchers::EndsWith(" bench --config job.toml --seed 7 --output bench-70_7.h5 --csv bench-70_7.csv --resume"));
}

TEST_CASE("check.sbatch passes its flags on, and its verdict back") {
  const Submission submission;

  const ProcessResult result = submission.run_script("check.sbatch", {"job.toml", "--cases", "5"}, {"LAUNCHER=srun", "LAUNCHER_EXIT=1"});
  const ProcessResult stopped = submission.run_script("check.sbatch", {"job.toml"}, {"LAUNCHER=srun", "LAUNCHER_EXIT=4"});

  INFO(result.out << result.err << stopped.err);
  CHECK(result.exit_code == 1);
  CHECK_THAT(first_line(result.out), Catch::Matchers::EndsWith(" check --config job.toml --cases 5"));
  CHECK(stopped.exit_code == 4);
  CHECK(read_text(submission / "asked").empty());
}

TEST_CASE("scaling.sbatch names the files of a point, and goes on with them unless they are to be replaced") {
  const Submission submission;
  std::ofstream(submission / "named.toml") << "seq-len = 64\nheads = 2\nhead-dim = 8\noutput = \"mine.h5\"\n";

  const ProcessResult plain = submission.run_script("scaling.sbatch", {"job.toml"}, {"LAUNCHER=srun"});
  const ProcessResult named = submission.run_script("scaling.sbatch", {"named.toml"}, {"LAUNCHER=srun"});
  const ProcessResult both = submission.run_script("scaling.sbatch", {"named.toml", "--csv", "other.csv", "--force"}, {"LAUNCHER=srun"});

  INFO(plain.err << named.err << both.err);
  CHECK_THAT(first_line(plain.out), Catch::Matchers::EndsWith(" bench --config job.toml --output bench-77.h5 --csv bench-77.csv --resume"));
  CHECK_THAT(first_line(named.out), Catch::Matchers::EndsWith(" bench --config named.toml --csv mine.csv --resume"));
  CHECK_THAT(first_line(both.out), Catch::Matchers::EndsWith(" bench --config named.toml --csv other.csv --force"));
}

TEST_CASE("a point that stopped with work left is put into the queue again, but not for ever, and not if it was told to end") {
  const Submission submission;
  const std::vector<std::string> stops{"LAUNCHER=srun", "LAUNCHER_EXIT=4"};

  bool warning_sent = false;
  const ProcessResult warned =
      submission.run_script("scaling.sbatch", {"job.toml"}, {"LAUNCHER=srun", "WAIT_FOR_SIGNAL=4"}, [&](pid_t job) {
        if (!warning_sent && read_text(submission / "started") == "waiting\n") { warning_sent = kill(job, SIGUSR1) == 0; }
      });
  std::filesystem::remove(submission / "started");
  const ProcessResult again = submission.run_script("scaling.sbatch", {"job.toml"}, stops);
  const std::string asked = read_text(submission / "asked");
  const ProcessResult often = submission.run_script("scaling.sbatch", {"job.toml"}, with(stops, {"SLURM_RESTART_COUNT=20"}));
  const ProcessResult passed = submission.run_script("scaling.sbatch", {"job.toml"}, {"LAUNCHER=srun"});
  bool sent = false;
  const ProcessResult ended = submission.run_script("scaling.sbatch", {"job.toml"}, {"LAUNCHER=srun", "WAIT_FOR_SIGNAL=4"}, [&](pid_t job) {
    if (!sent && read_text(submission / "started") == "waiting\n") { sent = kill(job, SIGTERM) == 0; }
  });

  INFO(warned.out << warned.err << again.err << often.err << passed.err << ended.err);
  CHECK(warned.exit_code == 128 + SIGKILL);
  CHECK_THAT(warned.out, contains_text("got USR1"));
  CHECK(again.exit_code == 128 + SIGKILL);
  CHECK(asked == "scontrol requeue 77\nscontrol requeue 77\n");
  CHECK(often.exit_code == 4);
  CHECK_THAT(often.err, contains_text("after 20 restarts"));
  CHECK(passed.exit_code == 0);
  CHECK(ended.exit_code == 4);
  CHECK_THAT(ended.err, contains_text("the same command goes on"));
  CHECK(read_text(submission / "asked") == asked);
}

TEST_CASE("a study is a job for each number of nodes, with the problem, the tokens or the FLOPs of a rank held") {
  const Submission submission;
  std::ofstream(submission / "base.toml") << "seq-len = 8192\nheads = 2\nhead-dim = 8\ncausal = true\n";
  std::ofstream(submission / "dilated.toml") << "seq-len = 8192\nheads = 2\nhead-dim = 8\nsegment-lengths = [1024]\n";
  const auto lengths = [&](const std::string& kind, const std::string& config) {
    const ProcessResult result =
        submission.run_script("submit_scaling.sh", {"--dry-run", kind, "1,2,4,16", "--ntasks-per-node=2", config, "--dtype", "bf16"}, {});
    INFO(result.out << result.err);
    CHECK(result.exit_code == 0);
    CHECK(result.out.find("Submitted") == std::string::npos);
    std::vector<std::string> found;
    for (std::size_t begin = 0; begin < result.out.size(); begin = result.out.find('\n', begin) + 1) {
      const std::string line = result.out.substr(begin, result.out.find('\n', begin) - begin);
      const std::size_t place = line.find("--seq-len ");
      found.push_back(place == std::string::npos ? "" : line.substr(place + 10, line.find(' ', place + 10) - place - 10));
    }
    return found;
  };
  using Lengths = std::vector<std::string>;

  CHECK(lengths("strong", "base.toml") == Lengths{"", "", "", ""});
  CHECK(lengths("weak-tokens", "base.toml") == Lengths{"8192", "16384", "32768", "131072"});
  // sqrt(2) x 8192 = 11585, in blocks of 256.
  CHECK(lengths("weak-flops", "base.toml") == Lengths{"8192", "11520", "16384", "32768"});
  CHECK(lengths("weak-flops", "dilated.toml") == Lengths{"8192", "16384", "32768", "131072"});
}

TEST_CASE("a study submits what --dry-run prints") {
  const Submission submission;

  const ProcessResult result = submission.run_script(
      "submit_scaling.sh", {"strong", "1,3", "--ntasks-per-node=8", "--exclusive", "--gpus-per-node=8", "job.toml", "--dtype", "bf16"}, {});

  INFO(result.out << result.err);
  CHECK(result.exit_code == 0);
  const std::string point = "--job-name=scaling-strong-24 --nodes=3 --ntasks-per-node=8 --exclusive --gpus-per-node=8 " + kScripts +
                            "/scaling.sbatch job.toml --dtype bf16 --output scaling-strong-24.h5 --csv scaling-strong-24.csv";
  CHECK_THAT(result.out, contains_text("sbatch " + point));
  CHECK_THAT(result.out, contains_text("Submitted " + point + "\n"));
}

TEST_CASE("a study that cannot be is refused before anything is submitted") {
  const Submission submission;
  std::ofstream(submission / "named.toml") << "seq-len = 64\noutput = \"mine.h5\"\n";
  const auto refusal = [&](const std::vector<std::string>& arguments) {
    const ProcessResult result = submission.run_script("submit_scaling.sh", arguments, {});
    INFO(result.out << result.err);
    CHECK(result.exit_code == 2);
    CHECK(result.out.empty());
    return result.err;
  };

  CHECK_THAT(refusal({}), contains_text("usage: slurm/submit_scaling.sh"));
  CHECK_THAT(refusal({"weak", "1,2", "job.toml"}), contains_text("KIND is 'weak'"));
  CHECK_THAT(refusal({"strong", "1,,2", "job.toml"}), contains_text("NODES are '1,,2'"));
  CHECK_THAT(refusal({"strong", "1", "--time", "5", "job.toml"}), contains_text("it is written --NAME=VALUE"));
  CHECK_THAT(refusal({"strong", "1", "named.toml"}), contains_text("names --output or --csv"));
  CHECK_THAT(refusal({"weak-flops", "1", "job.toml", "--sweep", "seq-len=64,128"}), contains_text("which the configuration sweeps"));
  CHECK_THAT(refusal({"strong", "1", "absent.toml"}), contains_text("absent.toml"));
}
