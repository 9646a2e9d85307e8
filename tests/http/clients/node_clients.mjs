// openai-node and the Vercel AI SDK against a server of the test model.
//
//     node node_clients.mjs http://127.0.0.1:8000/v1
//
// Each check prints its name; the first that fails ends the program with its error.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import {
  APICallError,
  experimental_generateSpeech as generateSpeech,
  generateImage,
  generateText,
  streamText,
} from "ai";
import OpenAI, { toFile } from "openai";

const baseURL = process.argv[2];
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const compatible = createOpenAICompatible({ name: "mstar", baseURL, apiKey: "none", includeUsage: true });
const vercel = createOpenAI({ baseURL, apiKey: "none" });
const model = "every";
const messages = [{ role: "user", content: "hello" }];
const said = "0 1 2 ";

/** Width and height of a PNG. */
function sizeOf(bytes) {
  const png = Buffer.from(bytes);
  assert.equal(png.subarray(1, 4).toString("latin1"), "PNG");
  return [png.readUInt32BE(16), png.readUInt32BE(20)];
}

async function listOf(stream) {
  const items = [];
  for await (const item of stream) items.push(item);
  return items;
}

const checks = {
  async "openai: models"() {
    const ids = (await listOf(client.models.list())).map((found) => found.id);
    assert.deepEqual(ids, ["tts-1", "org/name", "every"]);
    assert.equal((await client.models.retrieve("org/name")).id, "org/name");
  },

  async "openai: chat"() {
    const { data, response } = await client.chat.completions
      .create({ model, messages, temperature: 0.5, seed: 1 })
      .withResponse();
    assert.equal(data.choices[0].message.content, said);
    assert.equal(data.choices[0].finish_reason, "stop");
    assert.equal(data.usage.completion_tokens, 3);
    assert.equal(response.headers.get("x-request-id"), data._request_id);
  },

  async "openai: stream"() {
    const options = { stream: true, stream_options: { include_usage: true } };
    const chunks = await listOf(await client.chat.completions.create({ model, messages, ...options }));
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), said);
    assert.equal(chunks.at(-1).usage.completion_tokens, 3);
    const runner = client.chat.completions.stream({ model, messages });
    assert.equal((await runner.finalChatCompletion()).choices[0].message.content, said);
  },

  async "openai: leaving a stream"() {
    const endless = { count: 100_000, pause: 0.01 };
    const stream = await client.chat.completions.create({ model, messages, stream: true, ...endless });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
  },

  async "openai: errors"() {
    const bad = client.chat.completions.create({ model, messages, temperature: 3 });
    await assert.rejects(bad, (error) => {
      assert(error instanceof OpenAI.BadRequestError);
      assert.deepEqual([error.status, error.param, error.code], [400, "temperature", "invalid_value"]);
      return /temperature/.test(error.message) && Boolean(error.requestID);
    });
    await assert.rejects(client.models.retrieve("none"), OpenAI.NotFoundError);
    const stream = await client.chat.completions.create({
      model, messages, stream: true, late_poison: true,
    });
    await assert.rejects(listOf(stream), /poison in the batch/);
  },

  async "openai: speech"() {
    const spoken = { model, voice: "Ethan", input: "hello" };
    const reply = await client.audio.speech.create({ ...spoken, response_format: "pcm" });
    assert.equal((await reply.arrayBuffer()).byteLength, 3 * 480);
    const wav = await client.audio.speech.create({ ...spoken, response_format: "wav" });
    assert.equal(Buffer.from(await wav.arrayBuffer()).subarray(0, 4).toString(), "RIFF");
  },

  async "openai: images"() {
    const drawn = await client.images.generate({ model, prompt: "a cat", size: "64x32", n: 2 });
    for (const { b64_json } of drawn.data) {
      assert.deepEqual(sizeOf(Buffer.from(b64_json, "base64")), [64, 32]);
    }
    const image = await toFile(Buffer.from(drawn.data[0].b64_json, "base64"), "cat.png");
    const edited = await client.images.edit({ model, image, prompt: "a blue cat" });
    assert.deepEqual(sizeOf(Buffer.from(edited.data[0].b64_json, "base64")), [64, 32]);
    const options = { size: "64x32", stream: true, partial_images: 1 };
    const events = await listOf(await client.images.generate({ model, prompt: "a cat", ...options }));
    const types = events.map((event) => event.type);
    assert.deepEqual(types, ["image_generation.partial_image", "image_generation.completed"]);
  },

  async "vercel: generateText"() {
    for (const found of [compatible(model), vercel.chat(model)]) {
      const { text, finishReason, usage } = await generateText({ model: found, prompt: "hello" });
      assert.deepEqual([text, finishReason, usage.outputTokens], [said, "stop", 3]);
    }
  },

  async "vercel: streamText"() {
    for (const found of [compatible(model), vercel.chat(model)]) {
      const result = streamText({ model: found, prompt: "hello" });
      assert.equal((await listOf(result.textStream)).join(""), said);
      assert.equal((await result.usage).outputTokens, 3);
      assert.equal(await result.finishReason, "stop");
    }
  },

  async "vercel: a picture in the prompt"() {
    const { image } = await generateImage({
      model: compatible.imageModel(model), prompt: "a cat", size: "64x32",
    });
    assert.deepEqual(sizeOf(image.uint8Array), [64, 32]);
    const content = [{ type: "text", text: "what?" }, { type: "image", image: image.uint8Array }];
    const { text } = await generateText({
      model: compatible(model), messages: [{ role: "user", content }],
      providerOptions: { mstar: { tell: true } },
    });
    const told = JSON.parse(text).messages[0].content;
    assert.match(told[1].image, new RegExp(`^${image.uint8Array.length} bytes`));
  },

  async "vercel: generateImage"() {
    const { images } = await generateImage({
      model: vercel.imageModel(model), prompt: "a cat", size: "64x32", n: 2,
    });
    assert.deepEqual(images.map((image) => sizeOf(image.uint8Array)), [[64, 32], [64, 32]]);
  },

  async "vercel: speech"() {
    const { audio } = await generateSpeech({
      model: vercel.speech(model), text: "hello", voice: "Ethan", outputFormat: "wav",
    });
    assert.equal(Buffer.from(audio.uint8Array).subarray(8, 12).toString(), "WAVE");
  },

  async "vercel: errors"() {
    const asked = { model: compatible("none"), prompt: "hello", maxRetries: 0 };
    await assert.rejects(generateText(asked), (error) => {
      assert(APICallError.isInstance(error));
      return error.statusCode === 404 && /not served here/.test(error.message) && !error.isRetryable;
    });
  },
};

for (const name of ["openai", "ai"]) {
  const { version } = JSON.parse(readFileSync(`node_modules/${name}/package.json`));
  console.log(`# ${name} ${version}`);
}
for (const [name, check] of Object.entries(checks)) {
  await check().catch((error) => {
    console.error(`${name}: ${error.stack ?? error}`);
    process.exit(1);
  });
  console.log(name);
}
