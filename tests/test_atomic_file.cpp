// test_atomic_file - a file appears whole or not at all, and a killed writer's remains are removed
// by the next one, a living writer's never.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <fstream>

#include "model/atomic_file.h"
#include "tests/expect_error.h"
#include "tests/temp_dir.h"

namespace tq {
namespace {

using Names = std::vector<std::string>;

// A process that has begun to write `path`; it waits to be killed.
pid_t start_writer(const std::string& path) {
  int ready[2];
  EXPECT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    AtomicFile file(path);
    file.write("half", 4);
    if (::write(ready[1], "x", 1) == 1) ::pause();
    ::_exit(1);
  }
  char byte = 0;
  EXPECT_EQ(::read(ready[0], &byte, 1), 1);
  ::close(ready[0]);
  ::close(ready[1]);
  return child;
}

void kill_writer(pid_t child) {
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

TEST(AtomicFile, AppearsOnlyWhenFinished) {
  TempDir dir;
  write_text_file(dir / "a", "old");
  {
    AtomicFile file(dir / "a");
    file.write("new", 3);
    EXPECT_EQ(read_bytes(dir / "a"), "old");
    EXPECT_EQ(names_in(dir.path()).size(), 2u);
  }
  EXPECT_EQ(names_in(dir.path()), Names{"a"});
  EXPECT_EQ(read_bytes(dir / "a"), "old");
  write_text_file(dir / "a", "new");
  EXPECT_EQ(read_bytes(dir / "a"), "new");
  EXPECT_EQ(names_in(dir.path()), Names{"a"});
}

TEST(AtomicFile, RemainsOfAKilledWriterAreRemovedByTheNext) {
  TempDir dir;
  kill_writer(start_writer(dir / "a"));
  kill_writer(start_writer(dir / "b"));
  EXPECT_EQ(names_in(dir.path()).size(), 2u);
  write_text_file(dir / "a", "whole");
  ASSERT_EQ(names_in(dir.path()).size(), 2u);  // a, and what is left of b
  EXPECT_EQ(names_in(dir.path())[0], "a");
  EXPECT_TRUE(names_in(dir.path())[1].starts_with("b.tmp-"));
  write_text_file(dir / "b", "whole");
  EXPECT_EQ(names_in(dir.path()), (Names{"a", "b"}));
}

TEST(AtomicFile, AnotherWriterAtWorkIsLeftAlone) {
  TempDir dir;
  const pid_t other = start_writer(dir / "a");
  write_text_file(dir / "a", "mine");
  EXPECT_EQ(names_in(dir.path()), (Names{"a", "a.tmp-" + std::to_string(other)}));
  kill_writer(other);
}

TEST(AtomicFile, FilesThatAreNoRemainsStay) {
  TempDir dir;
  write_bytes(dir / "a.tmp-notes", "precious");
  write_bytes(dir / "a.tmp", "precious");
  write_text_file(dir / "a", "x");
  EXPECT_EQ(names_in(dir.path()), (Names{"a", "a.tmp", "a.tmp-notes"}));
}

mode_t mode_of(const std::string& path) {
  struct stat info = {};
  EXPECT_EQ(::stat(path.c_str(), &info), 0);
  return info.st_mode & 07777;
}

TEST(AtomicFile, NewFilesObeyTheUmaskAndOthersKeepTheirMode) {
  TempDir dir;
  const mode_t old = ::umask(002);
  write_text_file(dir / "new", "x");
  EXPECT_EQ(mode_of(dir / "new"), 0664u);
  ::umask(077);
  write_text_file(dir / "private", "x");
  EXPECT_EQ(mode_of(dir / "private"), 0600u);
  ::umask(022);
  for (mode_t mode : {0600u, 0640u, 0664u, 0444u}) {
    ::chmod((dir / "new").c_str(), mode);
    AtomicFile file(dir / "new");
    file.write("half", 4);  // and not readable by others before it is whole
    EXPECT_EQ(mode_of(dir / "new.tmp-" + std::to_string(::getpid())), mode);
    file.finish();
    EXPECT_EQ(mode_of(dir / "new"), mode);
  }
  ::umask(old);
}

TEST(AtomicFile, LinksAreFollowedAndStayLinks) {
  TempDir dir;
  std::filesystem::create_directory(dir / "disk");
  write_bytes(dir / "disk/real", "old");
  std::filesystem::create_symlink("disk/real", dir / "near");
  std::filesystem::create_symlink(dir / "near", dir / "far");
  write_text_file(dir / "far", "new");
  EXPECT_TRUE(std::filesystem::is_symlink(dir / "far"));
  EXPECT_TRUE(std::filesystem::is_symlink(dir / "near"));
  EXPECT_EQ(read_bytes(dir / "disk/real"), "new");
  EXPECT_EQ(names_in(dir / "disk"), Names{"real"});
  expect_error(ErrorKind::kIo, {"far", "it exists"},
               [&] { AtomicFile(dir / "far", Replace::kNever); });
  std::filesystem::create_symlink("nowhere", dir / "broken");
  expect_error(ErrorKind::kIo, {"broken", "link to nothing"}, [&] { AtomicFile(dir / "broken"); });
  std::filesystem::create_symlink("loop", dir / "loop");
  expect_error(ErrorKind::kIo, {"loop"}, [&] { AtomicFile(dir / "loop"); });
}

TEST(AtomicFile, OpenDescriptorsDevicesPipesAndFoldersAreNeverReplaced) {
  TempDir dir;
  write_bytes(dir / "out", "what stdout is redirected to");
  const int saved = ::dup(1), out = ::open((dir / "out").c_str(), O_WRONLY);
  ::dup2(out, 1);
  ::mkfifo((dir / "pipe").c_str(), 0600);
  std::filesystem::create_symlink("/dev/stdout", dir / "link");
  for (const std::string& path :
       {std::string("/dev/stdout"), std::string("/dev/fd/1"), std::string("/proc/self/fd/1"),
        std::string("/dev/null"), dir / "link", dir / "pipe", dir.path()}) {
    for (Replace replace : {Replace::kAllowed, Replace::kNever}) {
      expect_error(ErrorKind::kIo, {"cannot write output", path},
                   [&] { AtomicFile(path, replace); });
    }
  }
  ::dup2(saved, 1);
  ::close(saved);
  ::close(out);
  EXPECT_EQ(read_bytes(dir / "out"), "what stdout is redirected to");
}

// Children that write `path` at the same moment; how many of them succeed.
int race(const std::string& path, Replace replace, int n_writers) {
  int start[2];
  EXPECT_EQ(::pipe(start), 0);
  std::vector<pid_t> children;
  for (int i = 0; i < n_writers; ++i) {
    children.push_back(::fork());
    if (children.back() != 0) continue;
    ::close(start[1]);
    char byte;
    if (::read(start[0], &byte, 1) != 0) ::_exit(9);
    try {
      AtomicFile file(path, replace);
      file.write("whole", 5);
      file.finish();
      ::_exit(0);
    } catch (const Error& error) {
      ::_exit(static_cast<int>(error.kind()));
    }
  }
  ::close(start[0]);
  ::close(start[1]);
  int n_done = 0;
  for (pid_t child : children) {
    int status = 0;
    ::waitpid(child, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 5));
    n_done += WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }
  return n_done;
}

TEST(AtomicFile, OneOfManyWritersOfANewFileSucceeds) {
  for (int round = 0; round < 40; ++round) {
    TempDir dir;
    EXPECT_EQ(race(dir / "a", Replace::kNever, 6), 1);
    EXPECT_EQ(names_in(dir.path()), Names{"a"});
    EXPECT_EQ(read_bytes(dir / "a"), "whole");
  }
}

TEST(AtomicFile, AWriterThatHasJustBegunIsNotTakenForLeftOver) {
  for (int round = 0; round < 40; ++round) {
    TempDir dir;
    EXPECT_EQ(race(dir / "a", Replace::kAllowed, 6), 6);
    EXPECT_EQ(names_in(dir.path()), Names{"a"});
  }
}

TEST(AtomicFile, TheLastWordsOfAProcessRemoveItsTemporaryFiles) {
  TempDir dir;
  AtomicFile a(dir / "a"), b(dir / "b");
  { AtomicFile gone(dir / "c"); }
  write_bytes(dir / "c.tmp-" + std::to_string(::getpid()), "of somebody else");
  remove_unfinished_files();
  EXPECT_EQ(names_in(dir.path()), Names{"c.tmp-" + std::to_string(::getpid())});
}

}  // namespace
}  // namespace tq
