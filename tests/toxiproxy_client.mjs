// What a user of toxiproxy-node-client does, against a control interface and the port of an echo.
// Prints one JSON object; test_toxiproxy.py says what it must be.
import { createRequire } from "node:module";
import net from "node:net";

const { Toxiproxy } = createRequire(process.env.CLIENT)("toxiproxy-node-client");
const [control, echo] = process.argv.slice(2);
const said = {};

// what comes back for `text`, how it ends, and after how many milliseconds
function converse(port, text) {
  return new Promise((resolve) => {
    const began = performance.now();
    const socket = net.connect(port, "127.0.0.1", () => socket.write(text));
    let got = "";
    const end = (how) => {
      socket.destroy();
      resolve({ got, how, ms: performance.now() - began });
    };
    socket.on("data", (data) => {
      got += data;
      if (got === text) end("whole");
    });
    socket.on("end", () => end("FIN"));
    socket.on("error", (error) => end(error.code));
  });
}

const toxiproxy = new Toxiproxy(`http://${control}`);
const proxy = await toxiproxy.createProxy({ name: "node", listen: "127.0.0.1:0", upstream: echo });
const port = Number(proxy.listen.split(":")[1]);
said.plain = await converse(port, "hello");

const latency = await proxy.addToxic({
  name: "slow", type: "latency", stream: "upstream", toxicity: 1, attributes: { latency: 200, jitter: 0 },
});
said.added = latency.toJson();
said.slow = await converse(port, "hello");
said.updated = (await latency.update({ attributes: { latency: 1, jitter: 1 } })).attributes;
said.read = (await proxy.getToxic("slow")).attributes;
await latency.remove();

await proxy.addToxic({ name: "cut", type: "limit_data", stream: "downstream", attributes: { bytes: 3 } });
said.limited = await converse(port, "hello");
said.twice = await proxy.addToxic({ name: "cut", type: "timeout", attributes: {} }).catch(String);
await proxy.update({ enabled: false, listen: proxy.listen, upstream: echo });
said.disabled = await converse(port, "hello");
await toxiproxy.reset();
said.reset = await converse(port, "hello");

said.populated = Object.keys(
  await toxiproxy.populate([
    { name: "node", listen: proxy.listen, upstream: echo },
    { name: "another", listen: "127.0.0.1:0", upstream: echo },
  ]),
);
for (const each of Object.values(await toxiproxy.getAll())) {
  if (said.populated.includes(each.name)) await each.remove();
}
said.removed = await toxiproxy.get("node").catch(String);
said.version = JSON.parse(await toxiproxy.getVersion()).version;
console.log(JSON.stringify(said));
