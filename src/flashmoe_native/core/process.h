// What happens to the process as a whole, met in one place: fork(), and the end of the program.
//
// fork() leaves the child with one thread, and with locks as the others happened to hold them. What
// has threads of its own is of no use there: it says so when it is used, and is left as it lies
// when it is destroyed.
//
// When a Python program ends, threads that ask for the GIL are ended where they stand, which C++
// does not survive. So every call that gives the GIL up is counted; at the end calls stop, as if
// they were interrupted, new ones are refused, and the interpreter waits for those under way.
#pragma once

namespace flashmoe {

// Follows fork(); called once, before any other of these.
void watch_process();

// Which process it was made in.
class Origin {
 public:
  Origin();
  // Whether this is a process that was forked since.
  bool elsewhere() const;

 private:
  int generation_;
};

// A call under way. Throws StateError once the program ends.
class Call {
 public:
  Call();
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  const Origin origin_;
};

// Refuses calls from now on.
void end_calls();
int calls_under_way();
// Throws StateError once the program ends: a call under way is to stop.
void require_running();

}  // namespace flashmoe
