//! `mapped:PATH[,offset=N]`.

use super::{create, open};
use crate::stream::qemu::page_compression::PageCompression;
use crate::sys::Stop;
use crate::transport::open::candidates::Candidates;
use crate::transport::open::{Endpoint, Opening, Scheme, SchemeAbilities, TlsCover, no_stream, parse_mapped};
use crate::transport::{
    Address, ChannelOptions, ChosenTransport, ConnectionOptions, DestinationConnection, OpenError,
    SourceConnection, StreamChannel, StreamOptions,
};

pub(in crate::transport) static SCHEME: Scheme = Scheme {
    name: "mapped",
    form: "mapped:PATH[,offset=N]",
    hint: "mapped:/path/of/the/file or mapped:/path/of/the/file,offset=4096",
    parse: parse_mapped,
    // The number of page channels is here the number of threads.
    abilities: SchemeAbilities {
        page_channels: true,
        pages_in_stream: false,
        answers: false,
        tls: TlsCover::Nothing,
        decides_late: false,
    },
    open: write,
    connect: no_stream,
    listen: |address, _, _| Ok(Box::new(Stored(address.clone()))),
};

fn write(opening: &Opening<'_>) -> Result<SourceConnection, OpenError> {
    let (address, channels) = (opening.address, &opening.options.channels);
    check_plain_pages(address, channels)?;
    let (path, offset) = address.file_at();
    let link = create(path, offset, opening.memory.clone(), channels.count, &channels.spawn)?;
    Ok(SourceConnection::new(Box::new(link), None).by(ChosenTransport::named(address)))
}

/// In a mapped-ram file pages are stored uncompressed.
fn check_plain_pages(address: &Address, channels: &ChannelOptions) -> Result<(), OpenError> {
    if channels.compression == PageCompression::Plain {
        return Ok(());
    }
    Err(OpenError::Compressed { address: address.to_string() })
}

/// An existing file to read.
#[derive(Debug)]
struct Stored(Address);

impl Endpoint for Stored {
    fn addresses(&self) -> Vec<Address> {
        vec![self.0.clone()]
    }

    fn accept_connection(
        &mut self,
        _candidates: &mut Candidates,
        options: &ConnectionOptions,
        _stop: &Stop,
    ) -> Result<DestinationConnection, OpenError> {
        let channels = &options.channels;
        check_plain_pages(&self.0, channels)?;
        let (path, offset) = self.0.file_at();
        let link = open(path, offset, channels.count, &channels.spawn)?;
        Ok(DestinationConnection::new(Box::new(link), None).by(ChosenTransport::named(&self.0)))
    }

    fn accept(&mut self, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
        no_stream(&self.0, options, stop)
    }
}
