// append: writes K, V and the signature of one token to its slot. Per-ISA include.

template <int D>
static inline void store_plane(uint8_t* to, Element element, const Rows& rows, int64_t token, int head,
                               float scale) {
  const int64_t at = token * rows.token_stride + head * rows.head_stride;
  if (element == rows.element && element_bytes(element) == 2) {  // the usual case, with a constant size
    __builtin_memcpy(to, (const uint16_t*)rows.data + at, 2 * D);
  } else if (element == rows.element) {
    __builtin_memcpy(to, (const float*)rows.data + at, 4 * D);
  } else {
    for (int i = 0; i < D; ++i)
      store_scalar(to, i, element, load_scalar(rows.data, at + i, rows.element) / scale);
  }
}

template <int D>
static void append_token(const AppendParams& p, int64_t token) {
  constexpr int S = coded_size(D);
  const Page& page = p.page;
  const int64_t slot = p.slots[token];
  if (slot < 0) return;
  const int64_t block = slot / page.block_size;
  const int offset = int(slot - block * page.block_size);
  const int row_bytes = D * element_bytes(page.element);
  for (int head = 0; head < page.num_kv_heads; ++head) {
    uint8_t* run = page.run(block, head);
    store_plane<D>(run + page.v_offset + offset * row_bytes, page.element, p.value, token, head,
                   page.v_scale);
    store_plane<D>(run + offset * row_bytes, page.element, p.key, token, head, page.k_scale);

    alignas(64) float x[S];
    load_vector<D>(p.key, token, head, x);
    hadamard<D>(x);
    if (p.key_mean) subtract<S>(x, p.key_mean + int64_t(head) * S);
    alignas(64) int32_t codes[S];
    encode<S>(x, outer_threshold<S>(x, p.coding), codes);
    uint32_t hi[S / kWord], lo[S / kWord];
    pack_planes<S>(codes, hi, lo);
    const int64_t at = int64_t(offset / kTile) * (S / kWord) * kTile + offset % kTile;
    uint32_t* hi_plane = (uint32_t*)(run + page.hi_offset) + at;
    uint32_t* lo_plane = (uint32_t*)(run + page.lo_offset) + at;
    for (int w = 0; w < S / kWord; ++w) {
      hi_plane[w * kTile] = hi[w];
      lo_plane[w * kTile] = lo[w];
    }
    store_scalar(run + page.scale_offset, offset, Element::f16, level_scale<S>(x, codes));
  }
}

template <int D>
static void gather_block(const Page& page, int64_t block, int kv_head, int count, const Rows& key,
                         const Rows& value, int64_t first_row) {
  const int row_bytes = D * element_bytes(page.element);
  const uint8_t* k = page.run(block, kv_head);
  const uint8_t* v = k + page.v_offset;
  for (int t = 0; t < count; ++t) {
    const int64_t k_at = (first_row + t) * key.token_stride + kv_head * key.head_stride;
    const int64_t v_at = (first_row + t) * value.token_stride + kv_head * value.head_stride;
    if (page.element == key.element) {
      __builtin_memcpy((uint8_t*)key.data + k_at * element_bytes(key.element), k + t * row_bytes, row_bytes);
      __builtin_memcpy((uint8_t*)value.data + v_at * element_bytes(key.element), v + t * row_bytes,
                       row_bytes);
    } else {
      for (int i = 0; i < D; ++i) {
        store_scalar(key.data, k_at + i, key.element,
                     load_scalar(k + t * row_bytes, i, page.element) * page.k_scale);
        store_scalar(value.data, v_at + i, value.element,
                     load_scalar(v + t * row_bytes, i, page.element) * page.v_scale);
      }
    }
  }
}
