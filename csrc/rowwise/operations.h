// The operations of rowwise.h that other compiled code calls, by instruction set.
#pragma once
#include <string>

#include "rowwise/rowwise.h"

namespace parco::rowwise {

struct Operations {
  void (*norm)(const Norm&);
  void (*gate)(const Gate&);
  void (*rotate)(const Rotation&);
  void (*attend)(const Attention&);
  void (*add)(const Sum&);
  void (*mix)(const Mix&);
};

// Those of an instruction set by its name in parco.machine.
Operations operations_of(const std::string& isa);

}  // namespace parco::rowwise
