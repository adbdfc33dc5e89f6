// test_atomic_file - a file appears whole or not at all, and a killed writer's remains are removed
// by the next one, a living writer's never.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "model/atomic_file.h"
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

}  // namespace
}  // namespace tq
