//! One step of the search alone: the case that STATIC published, 2048 codes, 8 levels, 20 million items,
//! two requests of 70 beams; and the same with one prefix that holds half of the items.

use std::sync::Arc;
use std::time::Instant;

use beamline_catalog::{Catalog, CatalogLimits, FilterSpec, ItemRecord, SidPart, WrittenSymbols};
use beamline_compute::cuda::device::{Device, Memory};
use beamline_model::cuda::beams::DeviceSearch;
use beamline_model::cuda::catalog::DeviceTrie;
use beamline_model::decode::{Normalization, SearchRequest, Step};
use serde_json::json;

use crate::world::random;
use crate::{Args, Output};

pub(crate) fn measure(device: &Arc<dyn Device>, args: &Args, output: &mut Output) {
    let (items, levels, codes, width): (usize, usize, u32, usize) = if args.shape == "tiny" {
        (200, 4, 8, 5)
    } else {
        (if args.quick { 2_000_000 } else { 20_000_000 }, 8, 2048, 70)
    };
    for hot in [false, true] {
        let mut random = random(11);
        let record = |index: usize| {
            let mut sid: Vec<SidPart> =
                (0..levels).map(|_| SidPart::Code(random(u64::from(codes)) as u32)).collect();
            if hot && index.is_multiple_of(2) {
                sid[0] = SidPart::Code(3);
            }
            ItemRecord { item_id: format!("{index:x}"), sid, tags: Vec::new(), title: None }
        };
        let catalog = Catalog::from_records(
            (0..items).map(record),
            &WrittenSymbols::codes(),
            &CatalogLimits::default(),
        );
        let catalog = Arc::new(catalog.unwrap());
        let trie = Arc::new(DeviceTrie::new(device, catalog.trie()).unwrap());
        let logits: Vec<f32> =
            (0..width * codes as usize).map(|_| random(1 << 20) as f32 / 65536.0 - 16.0).collect();
        let logits = Memory::of(device, &logits).unwrap();
        let normalizers = Memory::of(device, &vec![1.0_f32; width]).unwrap();
        let request = SearchRequest {
            catalog: Arc::clone(&catalog),
            filter: catalog.filter(&FilterSpec::default()),
            start: catalog.trie().root(),
            steps: vec![Step::Level; levels].into(),
            normalization: Normalization::FullVocab,
            normalize_over: None,
            widths: None,
        };
        let mut times = vec![Vec::new(); levels];
        for _ in 0..args.repetitions.max(2) {
            let mut searches: Vec<DeviceSearch> = (0..2)
                .map(|_| DeviceSearch::new(device, request.clone(), Arc::clone(&trie), width).unwrap())
                .collect();
            for times in &mut times {
                device.wait().unwrap();
                let start = Instant::now();
                DeviceSearch::expand_together(device, &mut searches, logits.address(), normalizers.address())
                    .unwrap();
                device.wait().unwrap();
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
            assert!(searches.iter().all(|search| !search.found().unwrap().unwrap().is_empty()));
        }
        for (level, times) in times.iter_mut().enumerate() {
            times.sort_by(f64::total_cmp);
            output.put(&json!({
                "section": "expansion", "hot_prefix": hot, "level": level, "items": items, "levels": levels,
                "codes": codes, "beam": width, "batch": 2, "median_ms": times[times.len() / 2], "fastest_ms": times[0],
                "note": "launches and the wait for them included",
            }));
        }
    }
}
