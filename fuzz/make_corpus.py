"""Writes corpus/: hand-made files that a parser must refuse (bad_*) or accept (good_*). Seeds of the fuzzer, and cases of the
ordinary tests. `python fuzz/make_corpus.py`"""

import json
import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


EIGHT = b"12345678"
FILES = {
    "good_empty": file({}),
    "good_two": file({"a": entry(), "b": entry("U8", (), (8, 9))}, EIGHT + b"x"),
    "good_metadata": file({"__metadata__": {"format": "pt"}, "a": entry()}, EIGHT),
    "good_zero_sized": file({"a": entry(shape=(0, 4), offsets=(0, 0)), "b": entry()}, EIGHT),
    "good_zero_times_huge": file({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}),
    "good_unknown_member": file({"a": entry(extra={"x": [1, {"y": None}]})}, EIGHT),
    "good_padded": file(json.dumps({"a": entry()}) + "     ", EIGHT),
    "good_four_bit": file({"a": entry("F4", (4,), (0, 2))}, b"12"),
    "good_unicode_name": file('{"\u00e4\U0001f600":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "bad_no_bytes": b"",
    "bad_short": b"1234567",
    "bad_header_cut": file({"a": entry()}, b"", 1000),
    "bad_header_length_max": file({}, b"", 2**64 - 1),
    "bad_header_length_huge": file({}, b"", 2**62),
    "bad_not_json": file("{nonsense"),
    "bad_empty_header": file(""),
    "bad_trailing_text": file('{"a":' + json.dumps(entry()) + "}}", EIGHT),
    "bad_not_utf8": file(b'{"\xff\xfe":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "bad_utf16": file(json.dumps({"a": entry()}).encode("utf-16"), EIGHT),
    "bad_lone_surrogate": file('{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "bad_bom_twice": file(b"\xef\xbb\xbf\xef\xbb\xbf{}"),
    "bad_list": file("[]"),
    "bad_number": file("3"),
    "bad_null": file("null"),
    "bad_deep_list": file("[" * 50_000),
    "bad_deep_object": file('{"a":' * 20_000),
    "bad_deep_shape": file('{"a":{"dtype":"F32","shape":' + "[" * 20_000 + "]" * 20_000 + ',"data_offsets":[0,8]}}', EIGHT),
    "bad_deep_extra": file('{"a":{"x":' + "[" * 20_000 + "]" * 20_000 + "}}"),
    "bad_entry_number": file({"a": 3}),
    "bad_entry_list": file({"a": []}),
    "bad_entry_null": file({"a": None}),
    "bad_no_dtype": file({"a": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT),
    "bad_no_shape": file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT),
    "bad_no_offsets": file({"a": {"dtype": "F32", "shape": [2]}}, EIGHT),
    "bad_dtype_unknown": file({"a": entry("F31")}, EIGHT),
    "bad_dtype_number": file({"a": entry(4)}, EIGHT),
    "bad_dtype_list": file({"a": entry(["F32"])}, EIGHT),
    "bad_shape_number": file({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, EIGHT),
    "bad_shape_object": file({"a": {"dtype": "F32", "shape": {"0": 2}, "data_offsets": [0, 8]}}, EIGHT),
    "bad_shape_negative": file({"a": entry(shape=(-2,))}, EIGHT),
    "bad_shape_float": file({"a": entry(shape=(2.0,))}, EIGHT),
    "bad_shape_text": file({"a": entry(shape=("2",))}, EIGHT),
    "bad_shape_bool": file({"a": entry(shape=(True,))}, EIGHT),
    "bad_shape_over_int64": file({"a": entry(shape=(2**63,))}, EIGHT),
    "bad_shape_over_uint64": file({"a": entry(shape=(2**64 + 2,))}, EIGHT),
    "bad_shape_exponent": file('{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}}', EIGHT),
    "bad_shape_product_overflows": file({"a": entry(shape=(2**32, 2**32, 4))}, EIGHT),
    "bad_shape_product_wraps_to_fit": file({"a": entry(shape=(2**61 + 1, 8))}, EIGHT),
    "bad_shape_many_dimensions": file({"a": entry(shape=[1] * 100 + [2])}, EIGHT),
    "bad_size_mismatch": file({"a": entry(shape=(3,))}, EIGHT),
    "bad_offsets_backwards": file({"a": entry(offsets=(8, 0))}, EIGHT),
    "bad_offsets_three": file({"a": entry(offsets=(0, 8, 9))}, EIGHT),
    "bad_offsets_one": file({"a": entry(offsets=(8,))}, EIGHT),
    "bad_offsets_text": file({"a": entry(offsets=("0", 8))}, EIGHT),
    "bad_offsets_negative": file({"a": entry(offsets=(-8, 0))}, EIGHT),
    "bad_offsets_number": file({"a": {"dtype": "F32", "shape": [2], "data_offsets": 8}}, EIGHT),
    "bad_offsets_beyond": file({"a": entry(offsets=(2**63, 2**63 + 8))}, EIGHT),
    "bad_data_cut": file({"a": entry()}, b"1234567"),
    "bad_data_left": file({"a": entry()}, EIGHT + b"x"),
    "bad_gap": file({"a": entry("U8", (2,), (0, 2)), "b": entry("U8", (2,), (6, 8))}, EIGHT),
    "bad_starts_late": file({"a": entry("F32", (1,), (4, 8))}, EIGHT),
    "bad_overlap": file({"a": entry("U8", (6,), (0, 6)), "b": entry("U8", (4,), (4, 8))}, EIGHT),
    "bad_same_bytes": file({"a": entry(), "b": entry()}, EIGHT),
    "bad_name_twice": file('{"a":%s,"a":%s}' % ((json.dumps(entry()),) * 2), EIGHT),
    "bad_shape_twice": file('{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', EIGHT),
    "bad_metadata_number": file({"__metadata__": {"x": 1}}),
    "bad_metadata_nested": file({"__metadata__": {"x": {"y": "z"}}}),
    "bad_metadata_list": file({"__metadata__": []}),
    "bad_half_a_byte": file({"a": entry("F4", (3,), (0, 2))}, b"12"),
}
INDICES = {
    "good_index": {"metadata": {"total_size": 8, "more": [{}]}, "weight_map": {"a": "model-00001-of-00001.safetensors"}},
    "good_index_empty": {"weight_map": {}},
    "bad_index_no_map": {"metadata": {}},
    "bad_index_list": '{"weight_map":[]}',
    "bad_index_text": '{"weight_map":"a"}',
    "bad_index_number": {"weight_map": {"a": 3}},
    "bad_index_object": {"weight_map": {"a": {"file": "x"}}},
    "bad_index_parent": {"weight_map": {"a": "../x.safetensors"}},
    "bad_index_dots": {"weight_map": {"a": ".."}},
    "bad_index_dot": {"weight_map": {"a": "."}},
    "bad_index_root": {"weight_map": {"a": "/etc/passwd"}},
    "bad_index_folder": {"weight_map": {"a": "x/y.safetensors"}},
    "bad_index_empty_name": {"weight_map": {"a": ""}},
    "bad_index_zero_byte": {"weight_map": {"a": "x\0y"}},
    "bad_index_twice": '{"weight_map":{"a":"x","a":"y"}}',
    "bad_index_map_twice": '{"weight_map":{"a":"x"},"weight_map":{"a":"y"}}',
    "bad_index_cut": '{"weight_map":{"a":"x"',
    "bad_index_deep": '{"weight_map":' + '{"a":' * 20_000,
    "bad_index_deep_metadata": '{"metadata":' + "[" * 20_000,
}


def main():
    CORPUS.mkdir(exist_ok=True)
    for old in CORPUS.iterdir():
        old.unlink()
    for name, content in FILES.items():
        (CORPUS / f"{name}.safetensors").write_bytes(content)
    for name, content in INDICES.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (CORPUS / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
