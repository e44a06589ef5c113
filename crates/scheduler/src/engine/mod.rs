//! The engine: one thread that owns a model and a scheduler, and handles to it.
//!
//! ```text
//!  EngineHandle::submit ──command──► thread: plan, step, commit ──oneshot──► Ticket
//! ```
//!
//! Invariants:
//!
//! - At most `max_queued` requests lie in the channel and the queue together. A place is taken
//!   before a command is sent and given back at admission, so the submitting thread learns of an
//!   overload at once.
//! - Every ticket is answered, even when the thread dies.
//! - A model that panics fails a step, not the thread.
//! - Idle, the thread sleeps on its channel, and wakes only to show that it is alive.
//!
//! Clocks, threads and channels are only here. There is no HTTP and no async runtime.

mod handle;
mod run;
mod shared;

use std::{
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use beamline_kv_cache::{CacheConfig, HostMemory};
use beamline_model::step::StepModel;

use crate::{
    limits::{ConfigError, SchedulerConfig},
    scheduler::Scheduler,
};
use handle::Command;
use run::Loop;
use shared::Shared;

pub use handle::{Completed, EngineHandle, Ticket, Unserved};
pub use shared::EngineStats;

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The operating system started no thread.
    #[error("no thread for the engine: {0}")]
    Thread(#[from] std::io::Error),
}

/// The engine's thread ended by a bug. All its tickets are answered with [`Unserved::Stopped`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the engine thread panicked")]
pub struct EngineDied;

/// A running engine. Dropping it detaches the thread, which ends when the last handle is gone and
/// the last request has ended.
pub struct Engine<P, A> {
    handle: EngineHandle<P, A>,
    thread: JoinHandle<()>,
}

impl<P: Clone + Send + Sync + 'static, A: Send + 'static> Engine<P, A> {
    /// Starts the thread that owns `model`.
    ///
    /// # Errors
    ///
    /// When the configuration cannot work, or the thread cannot be started.
    pub fn start<M>(model: M, config: SchedulerConfig, cache: CacheConfig) -> Result<Self, StartError>
    where
        M: StepModel<Payload = P, Answer = A> + Send + 'static,
    {
        Self::start_with(model, config, cache, None)
    }

    /// Like [`Engine::start`], with a second memory for evicted pages, which is freed when the
    /// engine ends.
    ///
    /// # Errors
    ///
    /// As [`Engine::start`].
    pub fn start_with<M>(
        model: M,
        config: SchedulerConfig,
        cache: CacheConfig,
        host: Option<HostMemory>,
    ) -> Result<Self, StartError>
    where
        M: StepModel<Payload = P, Answer = A> + Send + 'static,
    {
        let mut scheduler = Scheduler::new(config, cache)?;
        if let Some(host) = host {
            scheduler = scheduler.with_host_memory(host);
        }
        let shared = Arc::new(Shared::new(*scheduler.limits()));
        let (sender, commands) = mpsc::channel();
        let sender = Arc::new(sender);
        scheduler.set_waker({
            let (sender, shared) = (Arc::downgrade(&sender), Arc::clone(&shared));
            Arc::new(move || {
                // One wake-up is enough, however much happened.
                if !shared.set_woken()
                    && let Some(sender) = sender.upgrade()
                {
                    let _ = sender.send(Command::Wake);
                }
            })
        });
        let engine = Loop::new(model, scheduler, commands, shared.clone());
        let thread =
            std::thread::Builder::new().name("beamline-engine".into()).spawn(move || engine.run())?;
        Ok(Self { handle: EngineHandle::new(sender, shared), thread })
    }

    /// A handle for submitting requests.
    pub fn handle(&self) -> EngineHandle<P, A> {
        self.handle.clone()
    }

    /// Refuses new requests, waits at most `patience` for the accepted ones, drops the rest, and
    /// ends the thread. A step is not interrupted, so this may take one step longer. Blocks.
    ///
    /// # Errors
    ///
    /// When the thread has panicked.
    pub fn drain(self, patience: Duration) -> Result<(), EngineDied> {
        self.handle.start_drain(patience);
        self.thread.join().map_err(|_| EngineDied)
    }

    /// Waits until all other handles are gone and all requests have ended. Blocks.
    ///
    /// # Errors
    ///
    /// When the thread has panicked.
    pub fn join(self) -> Result<(), EngineDied> {
        drop(self.handle);
        self.thread.join().map_err(|_| EngineDied)
    }
}
