"""What is wrong with a request for images, and how it is answered."""

from __future__ import annotations

import io
import json
import struct
import zlib

import pytest
from PIL import Image

from tests.every_modality import picture
from tests.http.pictures import data_url, mask_of

PATH = "/v1/images/"
UNSUPPORTED = "unsupported_parameter"
RED = picture(48, 32, 255)
GREY = Image.effect_noise((48, 32), 50)


def saved(image: Image.Image, format: str) -> bytes:
    out = io.BytesIO()
    image.save(out, format)
    return out.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and little more."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + check + b"\0\0\0\x0aIDATx\x9c"


# Fields of a generation, param, code, part of the message.
GENERATIONS = [
    ({"prompt": None}, "prompt", None, "must be the text"),
    ({"prompt": ""}, "prompt", None, "is empty"),
    ({"prompt": " \n"}, "prompt", None, "is empty"),
    ({"prompt": 3}, "prompt", None, "must be the text"),
    ({"prompt": ["a cat"]}, "prompt", None, "must be the text"),
    ({"prompt": "a\0b"}, "prompt", None, "NUL"),
    ({"prompt": "x" * 32_001}, "prompt", None, "32001 characters': must be at most 32000"),
    ({"model": 3}, "model", None, "must be the name of a model"),
    ({"model": ""}, "model", None, "must be the name of a model"),
    ({"n": 0}, "n", None, "must be an integer from 1 to 10"),
    ({"n": 11}, "n", None, "must be an integer from 1 to 10"),
    ({"n": -1}, "n", None, "from 1 to 10"),
    ({"n": "3"}, "n", None, "n='3': must be an integer"),
    ({"n": 1.0}, "n", None, "must be an integer"),
    ({"n": True}, "n", None, "must be an integer"),
    ({"n": [2]}, "n", None, "must be an integer"),
    ({"n": 10**30}, "n", None, "from 1 to 10"),
    ({"size": "0x0"}, "size", None, "WIDTHxHEIGHT"),
    ({"size": "axb"}, "size", None, "size='axb': must be WIDTHxHEIGHT"),
    ({"size": "64"}, "size", None, "WIDTHxHEIGHT"),
    ({"size": "64x"}, "size", None, "WIDTHxHEIGHT"),
    ({"size": "64X32"}, "size", None, "WIDTHxHEIGHT"),
    ({"size": "-64x32"}, "size", None, "WIDTHxHEIGHT"),
    ({"size": "64x32\n"}, "size", None, "WIDTHxHEIGHT"),
    ({"size": "６４x32"}, "size", None, "WIDTHxHEIGHT"),
    ({"size": ""}, "size", None, "or auto"),
    ({"size": [64, 32]}, "size", None, "WIDTHxHEIGHT"),
    ({"size": 64}, "size", None, "WIDTHxHEIGHT"),
    ({"size": "8x64"}, "size", None, "size='8x64': width=8: must be an integer from 16 to 1024"),
    ({"size": "64x2048"}, "size", None, "height=2048: must be an integer from 16 to 1024"),
    ({"size": "99999999x1"}, "size", None, "WIDTHxHEIGHT"),
    ({"size": "64x64", "width": 64}, "size", None, "give either size or width, not both"),
    ({"size": "64x64", "width": 64, "height": 9}, "size", None, "height and width, not both"),
    ({"width": 8}, "width", None, "width=8: must be an integer"),
    ({"quality": "best"}, "quality", None, "must be one of low, medium"),
    ({"quality": 1}, "quality", None, "must be one of"),
    ({"background": "transparent"}, "background", UNSUPPORTED, "opaque images only"),
    ({"background": "blue"}, "background", None, "must be one of auto, opaque"),
    ({"background": {}}, "background", None, "must be one of auto, opaque"),
    ({"output_format": "gif"}, "output_format", None, "must be one of png, jpeg, webp"),
    ({"output_format": "jpg"}, "output_format", None, "must be one of png, jpeg, webp"),
    ({"output_format": None, "output_compression": 50}, "output_compression", UNSUPPORTED, "png"),
    ({"output_format": "jpeg", "output_compression": 101}, "output_compression", None, "0 to 100"),
    ({"output_format": "jpeg", "output_compression": -1}, "output_compression", None, "0 to 100"),
    ({"output_format": "webp", "output_compression": "50"}, "output_compression", None, "integer"),
    ({"response_format": "file"}, "response_format", None, "must be one of b64_json, url"),
    ({"response_format": []}, "response_format", None, "must be one of b64_json, url"),
    ({"style": "cubist"}, "style", None, "must be one of vivid, natural"),
    ({"moderation": "none"}, "moderation", None, "must be one of auto, low"),
    ({"stream": "true"}, "stream", None, "must be true or false"),
    ({"stream": 1}, "stream", None, "must be true or false"),
    ({"stream": True, "n": 2}, "n", UNSUPPORTED, "one image can be streamed"),
    ({"stream": True, "response_format": "url"}, "response_format", UNSUPPORTED, "b64_json only"),
    ({"stream": True, "partial_images": 4}, "partial_images", None, "from 0 to 3"),
    ({"stream": True, "partial_images": -1}, "partial_images", None, "from 0 to 3"),
    ({"stream": True, "partial_images": "2"}, "partial_images", None, "from 0 to 3"),
    ({"stream": True, "size": "8x8"}, "size", None, "width=8"),
    ({"partial_images": 1}, "partial_images", None, "needs stream=true"),
    ({"preview_every": 2}, "preview_every", None, "use stream and partial_images"),
    ({"mask": data_url(RED)}, "mask", UNSUPPORTED, "is for POST /v1/images/edits"),
    ({"image": data_url(RED)}, "image", UNSUPPORTED, "is for POST /v1/images/edits"),
    ({"images": []}, "images", UNSUPPORTED, "is for POST /v1/images/edits"),
    ({"input_fidelity": "low"}, "input_fidelity", UNSUPPORTED, "is for POST /v1/images/edits"),
    ({"svg": {"model": "x"}}, "svg", UNSUPPORTED, "every does not have it"),
    ({"frame_count": 4}, "frame_count", UNSUPPORTED, "every does not have it"),
    ({"complexity": "low"}, "complexity", UNSUPPORTED, "every does not have it"),
    ({"seed": -1}, "seed", None, "must be an integer"),
    ({"seed": "7"}, "seed", None, "must be an integer"),
    ({"seed": 2**63 - 1, "n": 2}, "seed", None, "must be an integer"),
    ({"steps": 0}, "steps", None, "at least 1"),
    ({"steps": 2, "num_timesteps": 2}, "num_timesteps", None, "is the same parameter as steps"),
    ({"extra_body": 3}, "extra_body", None, "must be an object"),
    ({"extra_body": {"steps": "x"}}, "steps", None, "must be an integer"),
    ({"timeout": 0}, "timeout", None, "must be seconds above 0"),
    ({"timeout": "soon"}, "timeout", None, "must be seconds above 0"),
]

# Bodies, part of the message.
BODIES = [
    (b"", "not valid JSON"),
    (b"[]", "must be a JSON object"),
    (b'{"prompt": "x", "seed": NaN}', "NaN is not a number"),
    (b'{"prompt": "x", "n": 1e999}', "too large a number"),
    (b'{"prompt": "\\ud83d"}', "half of a surrogate pair"),
    (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested too deeply"),
]

A, B = ("image", RED), ("mask", mask_of(48, 32))
# Fields of an edit's form, its files, param, part of the message.
FORMS = [
    ({}, [], "image", "there is no image to edit"),
    ({}, [B], "image", "there is no image to edit"),
    ({"image": "/etc/passwd"}, [], "image", "no image"),
    ({"image": data_url(RED)}, [], "image", "no image"),
    ({}, [("image", b"")], "image", "the file is empty"),
    ({}, [("image", b"hello")], "image", ""),
    ({}, [("image", b"\x01\x02\x03\xff" * 99)], "image", ""),
    ({}, [("image", b"RIFF\0\0\0\0WAVEfmt ")], "image", ""),
    ({}, [("image", RED[:8])], "image", "broken"),
    ({}, [("image", RED[:60])], "image", "broken"),
    ({}, [("image", saved(GREY, "PNG")[:-200])], "image", "broken"),
    ({}, [("image", saved(GREY, "JPEG")[:-200])], "image", "broken"),
    ({}, [("image", saved(GREY, "WEBP")[:-200])], "image", "broken"),
    ({}, [("image", header_of(50_000, 50_000))], "image", "pixels"),
    ({}, [("image", header_of(9000, 9000))], "image", "the image has more than"),
    ({}, [("image", header_of(0, 0))], "image", ""),
    ({}, [A, ("image", RED[:60])], "image", "broken"),
    ({}, [("image[]", RED)] * 17, "image", "17 images': must be at most 16"),
    ({}, [A, B, B], "mask", "2 masks': must be given once"),
    ({}, [A, ("mask", mask_of(32, 48))], "mask", "32x48': must have the size of the image, 48x32"),
    ({}, [A, ("mask", RED)], "mask", "has no alpha channel"),
    ({}, [A, ("mask", saved(Image.new("RGBA", (48, 32)), "WEBP"))], "mask", "must be a PNG"),
    ({}, [A, ("mask", b"")], "mask", "the file is empty"),
    ({}, [A, ("mask", b"hello")], "mask", ""),
    ({}, [A, ("mask", mask_of(48, 32)[:50])], "mask", "broken"),
    ({}, [A, ("mask", header_of(50_000, 50_000))], "mask", "pixels"),
    ({"prompt": None}, [A], "prompt", "must be the text"),
    ({"prompt": ""}, [A], "prompt", "is empty"),
    ({"prompt": ["a", "b"]}, [A], "prompt", "must be given once"),
    ({"n": "0"}, [A], "n", "from 1 to 10"),
    ({"n": "11"}, [A], "n", "from 1 to 10"),
    ({"n": "three"}, [A], "n", "n='three': must be an integer"),
    ({"n": "1.5"}, [A], "n", "must be an integer"),
    ({"n": "1_0"}, [A], "n", "must be an integer"),
    ({"n": "9" * 5000}, [A], "n", "must be an integer"),
    ({"n": ["1", "2"]}, [A], "n", "must be given once"),
    ({"size": "axb"}, [A], "size", "WIDTHxHEIGHT"),
    ({"size": "8x8"}, [A], "size", "width=8"),
    ({"stream": "maybe"}, [A], "stream", "must be true or false"),
    ({"stream": "true", "n": "2"}, [A], "n", "one image can be streamed"),
    ({"input_fidelity": "high"}, [A], "input_fidelity", "every has low only"),
    ({"input_fidelity": "middling"}, [A], "input_fidelity", "must be one of low, high"),
    ({"markup": "x"}, [A], "markup", "every does not have it"),
    ({"svg[model]": "x"}, [A], "svg", "every does not have it"),
    ({"seed": "x"}, [A], "seed", "must be an integer"),
    ({"seed": "1.5"}, [A], "seed", "must be an integer"),
    ({"temperature": "nan"}, [A], "temperature", "must be a number"),
    ({"temperature": "inf"}, [A], "temperature", "must be a number"),
    ({"temperature": "1e999"}, [A], "temperature", "must be a number"),
    ({"ignore_eos": "perhaps"}, [A], "ignore_eos", "must be true or false"),
    ({"steps": "0"}, [A], "steps", "at least 1"),
    ({"stop[]": "a", "stop": "b"}, [A], "stop", "must be given once"),
    ({"stop": "b", "stop[]": "a"}, [A], "stop", "must be given once"),
    ({}, [A, ("seed", b"\xff\xfe")], "seed", "must be a value, not a file"),
    ({"extra_body": "{"}, [A], None, "extra_body is not valid JSON"),
    ({"extra_body": '{"steps": 0}'}, [A], "steps", "at least 1"),
]

# Fields of an edit in JSON, param, part of the message.
JSONS = [
    ({}, "image", "there is no image to edit"),
    ({"images": []}, "image", "there is no image to edit"),
    ({"image": data_url(RED), "images": [data_url(RED)]}, "images", "either image or images"),
    ({"images": [{"file_id": "file-1"}]}, "images", "no files are kept here"),
    ({"images": [3]}, "images", "must be a data URL"),
    ({"images": [{}]}, "images", "must be a data URL"),
    ({"images": [{"image_url": 3}]}, "images", "must be a data URL"),
    ({"images": [{"image_url": {}}]}, "images", "must be a data URL"),
    ({"images": {"image_url": None}}, "images", "must be a data URL"),
    ({"image": "/etc/passwd"}, "image", "must be a data URL"),
    ({"image": "file:///etc/passwd"}, "image", "must be a data URL"),
    ({"image": "http://10.0.0.1/a.png"}, "image", "nothing is fetched"),
    ({"image": "data:image/png;base64,###"}, "image", "is not base64"),
    ({"image": "data:image/png,x"}, "image", "must be base64"),
    ({"image": "data:;base64,"}, "image", "holds nothing"),
    ({"image": data_url(b"hello")}, "image", "holds text"),
    ({"image": data_url(RED[:60])}, "image", "broken"),
    ({"image": data_url(header_of(50_000, 50_000))}, "image", "pixels"),
    ({"images": [data_url(RED)] * 17}, "image", "at most 16"),
    ({"image": data_url(RED), "mask": data_url(mask_of(9, 9))}, "mask", "48x32"),
    ({"image": data_url(RED), "mask": [data_url(mask_of(48, 32))] * 2}, "mask", "2 masks"),
    ({"image": data_url(RED), "mask": 3}, "mask", "must be a data URL"),
    ({"image": data_url(RED), "prompt": None}, "prompt", "must be the text"),
    ({"image": data_url(RED), "n": "2"}, "n", "must be an integer"),
]


def check(reply, param: str | None, message: str, code: str | None = None) -> None:
    assert reply.status_code == 400, reply.text[:300]
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert message in error["message"]
    if code is not None:
        assert error["code"] == code


def short(case: object) -> str:
    return ascii(case)[:50]


@pytest.mark.parametrize(("fields", "param", "code", "message"), GENERATIONS, ids=short)
def test_generations(site, fields, param, code, message):
    reply = site.post(PATH + "generations", json={"model": "every", "prompt": "x", **fields})
    check(reply, param, message, code)


@pytest.mark.parametrize(("body", "message"), BODIES, ids=short)
@pytest.mark.parametrize("route", ["generations", "edits"])
def test_bodies(site, route, body, message):
    headers = {"content-type": "application/json"}
    check(site.post(PATH + route, data=body, headers=headers), None, message)


@pytest.mark.parametrize(("fields", "files", "param", "message"), FORMS, ids=short)
def test_forms(site, fields, files, param, message):
    files = [(name, ("upload", data, "application/octet-stream")) for name, data in files]
    fields = {"model": "every", "prompt": "x", **fields}
    if not files:  # a form of several parts all the same
        files = [("nothing", (None, ""))]
    check(site.post(PATH + "edits", data=fields, files=files), param, message)


@pytest.mark.parametrize(("fields", "param", "message"), JSONS, ids=short)
def test_edits_in_json(site, fields, param, message):
    check(site.post(PATH + "edits", json={"prompt": "x", **fields}), param, message)


@pytest.mark.parametrize("kind", ["", "text/plain", "image/png"])
def test_kinds_of_bodies(site, kind):
    headers = {"content-type": kind} if kind else {}
    check(site.post(PATH + "edits", data=RED, headers=headers), None, "multipart/form-data")
    check(site.post(PATH + "generations", data=RED, headers=headers), None, "application/json")


def test_broken_forms(site):
    headers = {"content-type": "multipart/form-data; boundary=b"}
    check(site.post(PATH + "edits", data=b"--c\r\n", headers=headers), None, "form is broken")


def test_a_body_may_be_too_long(site):
    for route in ("generations", "edits"):
        reply = site.post(PATH + route, json={"prompt": "x" * 2**20})
        assert reply.status_code == 413


@pytest.mark.parametrize("model", ["gpt-image-1", "x" * 10_000])
def test_other_models_are_not_here(site, model):
    for route, more in (("generations", {}), ("edits", {"image": data_url(RED)})):
        reply = site.post(PATH + route, json={"prompt": "x", "model": model, **more})
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"


def test_routes_that_are_not_there(site):
    reply = site.post(PATH + "variations", files={"image": RED})
    assert reply.status_code == 404
    assert "use" in reply.json()["error"]["message"]
    assert "POST /v1/images/edits" in reply.json()["error"]["message"]
    for name in ("x.png", "..%2f..%2fetc%2fpasswd", "%00", "é.png", "x" * 5000):
        assert site.get(f"{PATH}files/{name}").status_code == 404
    assert site.post(PATH + "files/x.png").status_code == 405
    assert site.get(PATH + "generations").status_code == 405


def test_there_are_many_cases():
    assert sum(map(len, (GENERATIONS, BODIES, FORMS, JSONS))) >= 150
    assert json.dumps([case[0] for case in GENERATIONS])
