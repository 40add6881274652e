// Rows of maps as long as memory allows: fewer and fuller pieces of work.
#pragma once

#include <initializer_list>

#include "common/platform.h"

namespace gi {

// Makes the rows of maps [B,C,H,W] one long row where they follow each other without a gap in all of them.
inline void join_rows(std::initializer_list<Array*> maps) {
  for (const Array* map : maps)
    if (map->stride[2] != map->size[3] * map->stride[3]) return;
  for (Array* map : maps) {
    map->size[3] *= map->size[2];
    map->size[2] = 1;
  }
}

}  // namespace gi
