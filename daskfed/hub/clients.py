"""The clients' streams: Dask's client protocol in, statuses of keys out."""

from __future__ import annotations

import asyncio
import hmac
import inspect
import itertools
import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

from distributed.comm.core import Comm, CommClosedError
from distributed.core import Status

from daskfed.comm.prompt import PromptSend
from daskfed.config import client_grace_s
from daskfed.hub import events as ev
from daskfed.hub.owners import brief, is_key, named_keys, not_yours, proof_of, reserved
from daskfed.hub.peers import key_holder
from daskfed.messages import PROTOCOL_VERSION, BlockKind, BlockSpec, Constraint, Key, decode_block

if TYPE_CHECKING:
    from daskfed.hub.server import Hub

logger = logging.getLogger(__name__)

FIRE_AND_FORGET = "fire-and-forget"  # who wants what is to run though no client waits for it
GONE = (ev.Outcome.CANCELLED, ev.Outcome.LOST)
LAST_WORDS_S = 1.0  # for telling clients that the federation ends
FLUSH_S = 0.002  # how often it is seen whether what was said has left
POLL_S = 0.02
HEARD_WITHIN_S = 2.0  # a client's stream that is further behind is not waited for
GRAPH_FIELDS = ("expr_ser", "internal_priority", "submitting_task", "fifo_timeout", "actors", "code")
ASKING = ("client-desires-keys", "report-key", "update-graph")  # with another's key: answered, and not done
CHANGING = ("cancel-keys",)  # with another's key: an error
ENDING = ("client-releases-keys", "fed-no-copies")  # with another's key: nothing happens
OPAQUE_FIELDS = (*GRAPH_FIELDS, "annotations", "span_metadata")


class ClientSession:
    """One connected client."""

    def __init__(self, client: str, stream: PromptSend, user: str) -> None:
        self.client = client
        self.user = user  # at the other end of its stream
        self.owner = user  # the user whom it acts for
        self.secret = ""  # shows whose its calls are, and that it comes back; stock clients have none
        self.stream = stream
        self.with_key = False  # it has shown a key, which says for whom it acts
        self.federated = False  # it is daskfed's client, not a stock one
        self.borrowed: dict[Key, None] = {}  # keys that it wants though it did not submit what makes them
        self.ended = False  # it said that it ends
        self.mark = 0  # the last that it set on its stream
        self.patience_s = inf  # how long its work waits for a site where there is none that may run it
        self.fuses = False  # it wants to know how long tasks take
        self.hears_all = False  # of all prefixes, since it has sent a graph of which only the site knows what it uses
        self.told: dict[str, tuple[float, int] | None] = {}  # prefixes that it uses -> what it knows of each

    def owned(self, spec: BlockSpec) -> BlockSpec:
        """Return a block so that it goes only to sites that serve its owner."""
        return replace(spec, constraint=replace(spec.constraint, owner=self.owner if self.with_key else ""))

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message; one that can no longer be sent is dropped."""
        with suppress(CommClosedError):
            self.stream.send(message)


class ClientSessions:
    """All clients of a hub."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.sessions: dict[str, ClientSession] = {}
        self.proofs: dict[str, str] = {}  # client that may come back -> digest of its secret
        self._graphs = itertools.count()

    def stream_handlers(self) -> dict[str, Callable[..., Any]]:
        """Return what a client may say on its stream."""
        return {
            "fed-hello": self.hello,
            "fed-submit": self.submit_blocks,
            "fed-back": self.back,
            "fed-no-copies": self.no_copies,
            "fed-mark": self.marked,
            "update-graph": self.update_graph,
            "client-desires-keys": self.desire,
            "client-releases-keys": self.release,
            "cancel-keys": self.cancel,
            "report-key": self.report,
            "heartbeat-client": _nothing,
            "close-client": _nothing,
        }

    # -- sessions ----------------------------------------------------------------------------------------------------

    async def register(self, comm: Comm, client: str, versions: Any = None) -> Status:
        """Serve a client's stream until it ends."""
        comm.name = "Hub->Client"
        if problem := self._refusal(client):
            await comm.write([{"op": "stream-start", "error": problem}])
            return Status.dont_reply
        stream = PromptSend(self.hub.loop)
        stream.start(comm)
        session = ClientSession(client, stream, self.hub.owners.user(comm))
        session.with_key = key_holder(comm) is not None
        stream.send({"op": "stream-start"})
        try:
            first = await self._first_words(comm, client) if client in self.proofs else ()
            self.sessions[client] = session
            self.hub.take(ev.ClientJoined(client, session.owner))
            await self._serve(comm, session, first)
        except (CommClosedError, PermissionError) as exc:
            session.send({"op": "fed-refused", "reason": str(exc)})
        finally:
            self._ended(session)
            with suppress(OSError, asyncio.TimeoutError):
                await stream.close(timeout=1)
            comm.abort()  # else it would be served as a caller's
        return Status.dont_reply

    def _ended(self, session: ClientSession) -> None:
        """A stream has ended: a stock client is gone with it, daskfed's own may come back."""
        if self.sessions.get(session.client) is not session:
            return
        if session.federated and not session.ended and self.hub.status is Status.running:
            logger.info("client %s lost its connection; it is waited for", session.client)
            self.hub.loop.call_later(client_grace_s(), self._gone, session)
        else:
            self._gone(session)
        if not session.stream.closed():
            session.send({"op": "stream-closed"})

    def _gone(self, session: ClientSession) -> None:
        if self.sessions.get(session.client) is session:
            del self.sessions[session.client]
            self.forget(session.client)
            self.hub.gateway.client_gone(session.client)
            self.hub.take(ev.ClientLeft(session.client))
            self.hub.ownerless.take_over(session.client)

    def forget(self, client: str) -> None:
        """A client is gone for good: it is not waited for."""
        self.proofs.pop(client, None)
        self.hub.journal.forget("client-proof", client)
        self.hub.journal.forget_client(client)
        self.hub.coordination.client_gone(client)

    def restore(self) -> None:
        """Know again by what the clients that were there can show who they are."""
        self.proofs.update(self.hub.journal.things("client-proof"))

    def _refusal(self, client: str) -> str | None:
        if client in self.sessions and client not in self.proofs:
            return f"a client {client!r} is connected already"
        return reserved(client)

    async def _first_words(self, comm: Comm, client: str) -> Any:
        """Return what a client says first that was here before; PermissionError where it does not show that it was."""
        messages = await comm.read()
        if not isinstance(messages, list | tuple):
            messages = (messages,)
        messages = sorted(messages, key=lambda message: message.get("op") != "fed-hello")
        said = messages[0].get("secret") if messages and messages[0]["op"] == "fed-hello" else None
        if not isinstance(said, str) or not hmac.compare_digest(proof_of(said), self.proofs.get(client, "")):
            raise PermissionError(f"a client {client!r} was here before, and this is another one")
        return messages

    async def _serve(self, comm: Comm, session: ClientSession, messages: Any) -> None:
        while True:
            for message in messages if isinstance(messages, (list, tuple)) else (messages,):
                op = message.get("op") if isinstance(message, dict) else None
                if not isinstance(op, str):
                    problem = f"TypeError: {brief(message)} is no message: that is a dict with the name of an op"
                    session.send({"op": "error", "exception": problem})
                elif op in ("close-stream", "close-client"):
                    session.ended = True
                    return
                else:
                    await self._dispatch(session, dict(message))
            await asyncio.sleep(0)
            try:
                messages = await comm.read()
            except CommClosedError:
                return

    async def _dispatch(self, session: ClientSession, message: dict[str, Any]) -> None:
        op = message.pop("op")
        handler = self.hub.stream_handlers.get(op)
        if handler is None:
            logger.warning("client %s sent %r, which the hub does not know", session.client, op)
            return
        if op != "client-desires-keys" or message.get("client") != FIRE_AND_FORGET:
            message["client"] = session.client  # a client speaks for itself only
        try:
            if not self._may(session, op, message):
                return
            result = handler(**self.hub.owners.under_owner(op, session.owner, message))
            if inspect.isawaitable(result):
                await result
        except Exception as exc:
            logger.exception("client %s sent a %r that failed", session.client, op)
            session.send({"op": "error", "exception": f"{type(exc).__name__}: {exc}"})

    def _may(self, session: ClientSession, op: str, message: dict[str, Any]) -> bool:
        """Say whether a client may do what it says, and take out of ``message`` the keys that it may not ask for.

        Raises PermissionError where it would do something to another's keys, TypeError where something is no key.
        """
        if op not in (*ASKING, *CHANGING, *ENDING):
            return True
        keys = named_keys(op, message)
        if op in ENDING:
            return all(map(is_key, keys))
        theirs = self.hub.owners.foreign(keys, session.owner)
        if theirs and op in CHANGING:
            raise PermissionError(not_yours(theirs))
        if theirs:
            self._refuse(session, keys if op == "update-graph" else theirs, theirs)
            message["keys"] = [key for key in keys if key not in theirs]
        return not theirs or op == "client-desires-keys"

    def _refuse(self, session: ClientSession, keys: Collection[Key], theirs: Collection[Key]) -> None:
        """Tell a client that it does not get ``keys``, since ``theirs`` are another's."""
        logger.warning("client %s named keys of another owner, first %r", session.client, next(iter(theirs)))
        session.send({"op": "cancelled-keys", "keys": list(keys), "reason": not_yours(theirs), "msg": None})

    async def close(self) -> None:
        """End every client's stream; tell them that the federation ends, unless the hub may be started again."""
        for session in list(self.sessions.values()):
            if session.federated and not self.hub.journal.durable:
                session.send({"op": "fed-ended"})
        await self._flushed()
        for session in list(self.sessions.values()):
            session.stream.abort()

    async def _flushed(self) -> None:
        """Wait until what was said last is on its way to all who listen: else they would wait for another hub."""
        deadline = time.monotonic() + LAST_WORDS_S
        await asyncio.sleep(2 * FLUSH_S)
        while any(each.stream.buffer and not each.stream.closed() for each in self.sessions.values()):
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(FLUSH_S)
        await asyncio.sleep(2 * FLUSH_S)

    # -- told by clients ---------------------------------------------------------------------------------------------

    def hello(
        self, client: str, protocol: int, owner: str, patience_s: float = inf, secret: str = "", fuses: bool = False
    ) -> None:
        """A client says that it is daskfed's own, for which user it acts, and how long its work waits for a site.

        Also whether it wants to know how long tasks take.
        """
        session = self.sessions[client]
        if protocol != PROTOCOL_VERSION:
            problem = f"the hub speaks protocol {PROTOCOL_VERSION}, this client {protocol}: install the same daskfed"
            session.send({"op": "fed-refused", "reason": problem})
            return
        session.federated, session.secret, session.patience_s, session.fuses = True, secret, patience_s, fuses
        session.owner = self.hub.owners.accepted(session.user, owner)
        if secret:
            self.proofs[client] = proof_of(secret)
            self.hub.journal.keep("client-proof", client, self.proofs[client])
        self.hub.journal.keep_client(client, session.owner)
        self.hub.take(ev.ClientJoined(client, session.owner))
        session.send({"op": "fed-sites", "sites": self.hub.gateway.sites_info()})

    async def submit_blocks(
        self,
        client: str,
        blocks: Collection[dict[str, Any]],
        payloads: Collection[Any],
        wanted: Collection[Key] | None,
        wait: bool = False,
    ) -> None:
        """A client submits blocks that it cut, and wants some of their outputs, or all."""
        specs, refused = await self._bound(client, self._specs(client, blocks))
        made = {key: key for spec in specs for key in spec.outputs}
        wanted = list(made) if wanted is None else [made.get(key, key) for key in wanted]  # one copy of each name
        inputs = (key for spec in specs for key in spec.inputs if key not in made)
        async with self.hub.nested.known(inputs, self.sessions[client].owner):
            if theirs := self._foreign(client, specs, wanted):
                self._refuse(self.sessions[client], wanted, theirs)
                for spec in specs:
                    self.tell_own(client, {"op": "fed-forget", "block": spec.id})
                return
            self.hub.stores.keep_payloads(specs, payloads)
            self.hub.take(ev.BlocksSubmitted(client, specs, tuple(wanted), wait, refused))
            self.hub.durations.used(self.sessions[client], specs)

    async def _bound(
        self, client: str, specs: tuple[BlockSpec, ...]
    ) -> tuple[tuple[BlockSpec, ...], tuple[tuple[str, str], ...]]:
        """Bind blocks to the sites of the workers that they name; the client hears it, for a hub that starts anew.

        Return the blocks, and (block, why) of those that name no worker, or one of several sites.
        """
        found, refused = await self.hub.fanout.bound(specs)
        pairs = zip(found, specs, strict=True)
        sites = {spec.id: list(spec.constraint.sites) for spec, given in pairs if spec is not given}
        if sites:
            self.tell_own(client, {"op": "fed-bound", "sites": sites})
        return found, refused

    async def _bound_again(
        self, client: str, specs: tuple[BlockSpec, ...], arrivals: Collection[int]
    ) -> tuple[tuple[BlockSpec, ...], tuple[tuple[str, str], ...]]:
        """As :meth:`_bound`, of blocks that came to a hub before this one: those whose client did not hear it."""
        unheard = tuple(
            spec
            for spec, arrival in zip(specs, arrivals, strict=True)
            if spec.constraint.workers and not (arrival and spec.constraint.sites)
        )
        if not unheard:
            return specs, ()
        while not self.hub.core.recovery.sites_told:
            await asyncio.sleep(POLL_S)
        found, refused = await self._bound(client, unheard)
        by_id = {spec.id: spec for spec in found}
        return tuple(by_id.get(spec.id, spec) for spec in specs), refused

    async def back(
        self,
        client: str,
        blocks: Collection[dict[str, Any]],
        arrivals: Collection[int],
        payloads: Collection[Any],
        wanted: Collection[Key],
        kept: Collection[Key] = (),
    ) -> None:
        """A client whose connection broke, or whose hub started anew, tells what it wants and how it is made."""
        specs, refused = await self._bound_again(client, self._specs(client, blocks), arrivals)
        known = tuple(zip(specs, arrivals, strict=True))
        if theirs := set(self._foreign(client, specs, wanted, kept)):
            self._refuse(self.sessions[client], theirs, theirs)
            known = tuple(each for each in known if theirs.isdisjoint((*each[0].inputs, *each[0].outputs)))
            wanted, kept = ([key for key in keys if key not in theirs] for keys in (wanted, kept))
        self.hub.stores.keep_payloads(specs, payloads)
        self.hub.take(ev.ClientBack(client, self.sessions[client].owner, known, tuple(wanted), tuple(kept), refused))
        self.hub.coordination.client_back(client)
        logger.info("client %s is back with %d blocks", client, len(specs))

    def _specs(self, client: str, blocks: Collection[dict[str, Any]]) -> tuple[BlockSpec, ...]:
        """Return the blocks of a client, which speaks for itself only."""
        session = self.sessions[client]
        own = {"client": client, "owner": session.owner, "patience_s": session.patience_s}
        specs = tuple(session.owned(decode_block({**block, **own})) for block in blocks)
        if strange := [spec.id for spec in specs if not spec.id.startswith(f"{client}/")]:
            raise ValueError(f"block {strange[0]!r} is not named after its client {client!r}")
        return specs

    def _foreign(self, client: str, specs: Collection[BlockSpec], *keys: Collection[Key]) -> list[Key]:
        """Return which of ``keys``, and of those that blocks need and make, are another owner's than the client's."""
        named = itertools.chain(*keys, *((*spec.inputs, *spec.outputs) for spec in specs))
        return self.hub.owners.foreign(named, self.sessions[client].owner)

    def update_graph(self, client: str, keys: Collection[Key], **fields: Any) -> None:
        """A client submits a whole graph, unopened: it runs at the client's home site."""
        session = self.sessions[client]
        home = self.hub.core.homes.home_of(client)
        spec = BlockSpec(
            id=f"{client}/whole-{self.hub.core.ledger.epoch}/{next(self._graphs)}",
            client=client,
            owner=session.owner,
            kind=BlockKind.WHOLE,
            inputs=self._borrowed(session, home, keys),
            outputs=tuple(keys),
            ntasks=max(1, len(keys)),
            prefixes=(),
            constraint=Constraint(sites=(home,) if home else ()),
            stateful=bool(fields.get("actors")),
            patience_s=session.patience_s,
        )
        spec = session.owned(spec)
        payload = {name: fields[name] for name in OPAQUE_FIELDS if name in fields} | {"keys": list(keys)}
        self.hub.stores.keep_payloads((spec,), (payload,))
        self.hub.take(ev.BlocksSubmitted(client, (spec,), tuple(keys), wait=True))
        self.hub.durations.used_unseen(session)

    def marked(self, client: str, mark: int) -> None:
        """All that a client said before it set this mark was heard."""
        self.sessions[client].mark = mark

    async def caught_up(self, client: str, mark: int) -> None:
        """Wait until what a client said on its stream before ``mark`` was heard: a call may overtake it."""
        deadline = time.monotonic() + HEARD_WITHIN_S
        while (session := self.sessions.get(client)) is not None and session.mark < mark:
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(FLUSH_S)

    def home_of_stock(self, client: str) -> list[str]:
        """Return the home site of a stock client, whose data is to be where its graphs run; nothing for other ones."""
        session = self.sessions.get(client)
        home = self.hub.core.homes.home_of(client) if session is not None and not session.federated else None
        return [home] if home is not None else []

    def _borrowed(self, session: ClientSession, home: str | None, outputs: Collection[Key]) -> tuple[Key, ...]:
        """Return what a whole graph may need of elsewhere: keys that its client got from others, not made at its home.

        Only the client knows what is in its graph, so all of them come along.
        """
        ledger = self.hub.core.ledger
        states = (ledger.keys.get(key) for key in session.borrowed if key not in outputs)
        made = ((state, ledger.blocks.get(state.producer or "")) for state in states if state is not None)
        at_home = (BlockKind.WHOLE, (home,))
        return tuple(
            state.key
            for state, block in made
            if block is None or (block.spec.kind, block.spec.constraint.sites) != at_home
        )

    def no_copies(self, client: str, keys: Collection[Key]) -> None:
        """A client was asked for copies that it does not have."""
        self.hub.take(ev.CopiesGone(client, tuple(keys)))

    async def desire(self, client: str, keys: Collection[Key]) -> None:
        """A client wants keys, or wants them made for nobody."""
        if client == FIRE_AND_FORGET:
            self.hub.coordination.hold(keys, client)
            return
        self.sessions[client].borrowed |= dict.fromkeys(keys)
        async with self.hub.nested.known(keys, self.sessions[client].owner):
            self.hub.take(ev.KeysDesired(client, tuple(keys)))

    def release(self, client: str, keys: Collection[Key]) -> None:
        """A client no longer wants keys."""
        for key in keys:
            self.sessions[client].borrowed.pop(key, None)
        self.hub.take(ev.KeysReleased(client, tuple(keys)))

    def cancel(
        self, client: str, keys: Collection[Key], force: bool = False, reason: str | None = None, msg: str | None = None
    ) -> None:
        """A client cancels keys."""
        self.hub.take(ev.KeysCancelled(client, tuple(keys), force, reason or "", msg))

    def report(self, client: str, key: Key) -> None:
        """A client asks how a key stands; one that nobody knows is lost, as in stock Dask."""
        if key in self.hub.core.ledger.keys:
            self.hub.take(ev.KeysDesired(client, (key,)))
        else:
            self.tell(ev.TellClient(client, ev.Outcome.LOST, (key,)))

    # -- told to clients ---------------------------------------------------------------------------------------------

    def tell(self, command: ev.TellClient) -> None:
        """Pass on how keys stand."""
        session = self.sessions.get(command.client)
        if session is None:
            if command.client == FIRE_AND_FORGET or command.outcome in GONE:
                self.hub.loop.add_callback(self.hub.coordination.let_go, command.keys, command.client)
            return
        if command.outcome in GONE:
            unsaid = "lost dependencies" if command.outcome is ev.Outcome.LOST else None
            why = {"reason": command.reason or unsaid, "msg": command.msg}
            session.send({"op": "cancelled-keys", "keys": list(command.keys), **why})
            return
        if theirs := self.hub.owners.foreign(command.keys, session.owner):
            self._refuse(session, theirs, theirs)
        if command.outcome is ev.Outcome.IN_MEMORY and session.federated and not theirs and self.hub.stores.passing:
            self._tell_with_values(session, command.keys)
            return
        for key in command.keys:
            if key not in theirs:
                session.send(self._status(key, command.outcome))

    def _tell_with_values(self, session: ClientSession, keys: Collection[Key]) -> None:
        """Tell that keys are made, with those values that have just come."""
        values, types = [self.hub.stores.passing.get(key) for key in keys], [self._type_of(key) for key in keys]
        alike = types[:1] if len(set(types)) == 1 else types
        session.send({"op": "fed-made", "keys": list(keys), "values": values, "types": alike})

    def tell_own(self, client: str, message: dict[str, Any]) -> None:
        """Send a message that only daskfed's own clients understand."""
        session = self.sessions.get(client)
        if session is not None and session.federated:
            session.send(message)

    def _status(self, key: Key, outcome: ev.Outcome) -> dict[str, Any]:
        stores = self.hub.stores
        if outcome is ev.Outcome.FAILED:
            return {"op": "task-erred", "key": key, **stores.errors[key]}
        if outcome is ev.Outcome.RETRIED:
            return {"op": "task-retried", "key": key}
        kind = self._type_of(key)
        return {"op": "key-in-memory", "key": key, **({} if kind is None else {"type": kind})}

    def _type_of(self, key: Key) -> Any:
        known = self.hub.core.ledger.keys.peek(key)
        return None if known is None else self.hub.stores.type_of(key, known.producer)

    def announce_sites(self) -> None:
        """Tell daskfed's own clients which sites there are."""
        if any(session.federated for session in self.sessions.values()):
            message = {"op": "fed-sites", "sites": self.hub.gateway.sites_info()}
            for session in self.sessions.values():
                if session.federated:
                    session.send(message)


def _nothing(client: str) -> None:
    pass
